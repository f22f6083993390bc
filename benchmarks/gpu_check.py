"""Acceptance on a machine with an NVIDIA GPU.

    python -m benchmarks.gpu_check --json benchmarks/results/h100.json
    python -m benchmarks.gpu_check --only kernels

Runs from a source tree with the interpreter at hand, installs nothing, needs no network. Each part
says what it found, a table of all parts comes last, and the status is 0 if every part passed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Final

from benchmarks import common
from benchmarks.gpu import kernels
from benchmarks.gpu.part import Outcome, Part
from semipd_jax import cuda_driver
from semipd_jax.errors import EngineError

PARTS: Final[Mapping[str, Part]] = MappingProxyType({"kernels": kernels.PART})


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.list:
        common.print_table(("part", ""), [(name, part.about) for name, part in PARTS.items()])
        return 0
    try:
        device = cuda_driver.describe(0)
    except EngineError as error:
        print(f"no GPU here: {error}", file=sys.stderr)
        return 1
    print(f"{device.name}, {device.num_sms} SMs\n")
    outcomes: dict[str, Outcome] = {}
    for name in args.only or PARTS:
        print(f"== {name}: {PARTS[name].about}", flush=True)
        outcomes[name] = PARTS[name].run()
    print()
    common.print_table(
        ("part", "result", "found"),
        [
            (name, "passed" if outcome.passed else "FAILED", "; ".join(outcome.found))
            for name, outcome in outcomes.items()
        ],
    )
    if args.json:
        parts = {name: asdict(outcome) for name, outcome in outcomes.items()}
        result = common.header(vars(args)) | {"device": asdict(device), "parts": parts}
        common.write_json(args.json, result)
    return int(not all(outcome.passed for outcome in outcomes.values()))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="Acceptance on an NVIDIA GPU."
    )
    parser.add_argument("--list", action="store_true", help="say what the parts are")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts [all]")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
