"""The kernels: what they use, compiled without a GPU; what they reach, on one.

    python -m benchmarks.kernels --compile-only --target a100
    python -m benchmarks.kernels --ops paged_decode_attention --json result.json

With `--compile-only` it compiles every GPU case and the engine's steps of Llama 3.1 8B for the
target and prints registers, spills, shared memory and thread blocks per SM; the status is 1 if a
gate fails. Without, it needs an NVIDIA GPU: every case is checked against the float32 reference and
timed in turns with what else is installed (`benchmarks.kernel_bench`).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

OPS = ("paged_decode_attention", "paged_prefill_attention", "kv_write", "rope_kv_write")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    result = common.header(vars(args))
    if args.compile_only:
        found, status = _compile_only(args)
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
        import jax

        if (platform := jax.default_backend()) != "gpu":
            print(f"no GPU here: jax runs on {platform}. See --compile-only.", file=sys.stderr)
            return 1
        from benchmarks.kernel_bench import run

        found, status = run.run(tuple(args.ops), budget_s=args.budget_s)
    if args.json:
        common.write_json(args.json, result | found)
    return status


def _compile_only(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from benchmarks.aot import table

    kernels, steps = table.compile_all(args.target, tuple(args.ops), jobs=args.jobs)
    print(f"compiled for {args.target}, not run\n")
    table.print_kernels(args.target, kernels)
    print()
    table.print_steps(steps)
    rows = [*kernels, *steps]
    table.print_faults(rows)
    return {
        "target": args.target,
        "kernels": [row.as_json() for row in kernels],
        "steps": [row.as_json() for row in steps],
    }, int(any(row.faults for row in rows))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Compile or measure the kernels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="which of them")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--budget-s", type=float, default=500.0, help="start no case after that")
    aot = parser.add_argument_group("without a GPU")
    aot.add_argument("--compile-only", action="store_true", help="compile for --target")
    aot.add_argument("--target", choices=["h100", "h200", "a100"], default="h100", help="the GPU")
    cores = len(os.sched_getaffinity(0))
    aot.add_argument("--jobs", type=int, default=cores, help="programs compiled at once")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
