"""Acceptance on a machine with an NVIDIA GPU.

    python -m benchmarks.gpu_check --json benchmarks/results/h100.json
    python -m benchmarks.gpu_check --only sharing mps
    python -m benchmarks.gpu_check --rehearse

Runs from a source tree (`PYTHONPATH=.:server`) with the interpreter at hand, installs nothing,
needs no network. Each part runs in a process of its own for at most ten minutes and says what it
found; a table of all parts comes last, and the status is 0 if every part passed. What is missing on
the machine is named in one line.

A rehearsal runs the same code on the CPU, small. It shows that the check works, nothing else.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from benchmarks.gpu.part import Outcome, Setting

PARTS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "sharing": ("benchmarks.gpu.storage", "one memory, several processes, updated in place"),
        "mps": ("benchmarks.gpu.shares", "SMs and GEMM time of each share, alone and together"),
        "kernels": ("benchmarks.gpu.kernels", "the kernels' numbers and speed"),
        "tokens": ("benchmarks.gpu.tokens", "the engine says what it says on the CPU"),
        "steps": ("benchmarks.gpu.steps", "steps of an 8B model on each share, and their floors"),
        "switching": ("benchmarks.gpu.switching", "what streams notice when shares change"),
        "faults": ("benchmarks.gpu.faults", "workers killed under load"),
    }
)
"""Name → module with `run(Setting) -> Outcome`, and what it is about."""

_TIMEOUT_S: Final = 600.0
_MODULE: Final = "benchmarks.gpu.part"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        from benchmarks import common
        from semipd_jax.errors import EngineError
    except ModuleNotFoundError as error:
        print(f"missing: the Python package {error.name}", file=sys.stderr)
        return 1
    if args.list:
        common.print_table(("part", ""), [(name, about) for name, (_, about) in PARTS.items()])
        return 0
    try:
        setting = _setting(rehearse=args.rehearse)
    except EngineError as error:
        print(f"no GPU here: {error}", file=sys.stderr)
        return 1
    print(f"{setting.name}, {setting.num_sms} SMs\n")
    outcomes: dict[str, Outcome] = {}
    for name in args.only or PARTS:
        module, about = PARTS[name]
        print(f"== {name}: {about}", flush=True)
        outcomes[name] = run_part(module, setting)
        for line in outcomes[name].found:
            print(f"   {line}", flush=True)
    print()
    common.print_table(
        ("part", "result"),
        [(name, "passed" if outcome.passed else "FAILED") for name, outcome in outcomes.items()],
    )
    if args.json:
        parts = {name: asdict(outcome) for name, outcome in outcomes.items()}
        result = common.header(vars(args)) | {"device": asdict(setting), "parts": parts}
        common.write_json(args.json, result)
    return int(not all(outcome.passed for outcome in outcomes.values()))


def run_part(module: str, setting: "Setting") -> "Outcome":
    """In a process group of its own, which ends with the time limit at the latest."""
    import msgspec

    from benchmarks.gpu.part import Outcome

    with tempfile.TemporaryDirectory(prefix="semipd-") as folder:
        path = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", _MODULE, module, str(path), json.dumps(asdict(setting))]
        with subprocess.Popen(command, process_group=0) as process:
            try:
                status = process.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return Outcome(False, (f"did not end within {_TIMEOUT_S:.0f} s",))
            finally:
                _end_group(process.pid)
        if not path.exists():
            return Outcome(False, (f"ended with status {status}; see its output above",))
        return msgspec.json.decode(path.read_bytes(), type=Outcome)


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _setting(*, rehearse: bool) -> "Setting":
    """Raises StartupError if there is no GPU that can be used. Makes no CUDA context here: peers
    have to choose first whether they are clients of MPS."""
    from benchmarks.gpu.part import Setting
    from semipd_jax.launch.device import usable_gpu

    if rehearse:
        return Setting("cpu", "a rehearsal on the CPU", 0)
    with tempfile.TemporaryDirectory(prefix="semipd-") as run_dir:
        gpu = usable_gpu(run_dir)
    return Setting("cuda", gpu.name, gpu.num_sms)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="Acceptance on an NVIDIA GPU."
    )
    parser.add_argument("--list", action="store_true", help="say what the parts are")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts [all]")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
