"""The attention kernels at every page size, head_dim, group and dtype that they are for.

    python -m benchmarks.aot.sweep --target a100 --json benchmarks/results/sweep-a100.json

Each is compiled, not run, in a process of its own; the table says registers, spills, shared memory
and thread blocks per SM. The status is 1 if a gate fails.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import common
from benchmarks.aot import programs, table
from benchmarks.aot.child import CompileError, compile_in_child
from benchmarks.aot.gates import kernel_faults
from kernels_pallas.cases import Heads
from semipd_jax.runtime.described_gpu import DescribedGpu, GpuName

PAGE_SIZES: Final = (16, 32, 64, 128)
HEAD_DIMS: Final = (64, 96, 128, 256)
GROUPS: Final = (1, 4, 7, 16, 64, 71)
DTYPES: Final = ("bfloat16", "float16")
OPTIONS: Final[dict[str, Any]] = {"window": 1024, "soft_cap": 50.0}
KV_HEADS: Final = 8
OPS: Final = ("paged_decode_attention", "paged_prefill_attention")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kernel is compiled for; the defaults are Llama's."""

    head_dim: int
    page_size: int = 64
    group: int = 4
    dtype: str = "bfloat16"
    has_options: bool = False

    def __str__(self) -> str:
        name = f"head_dim {self.head_dim}, page {self.page_size}, group {self.group}, {self.dtype}"
        return f"{name}, window and soft cap" if self.has_options else name

    def case(self, op: str) -> Any:
        """64 rows of 2048 tokens, or 2048 tokens after as many."""
        heads = Heads(self.group * KV_HEADS, KV_HEADS, self.head_dim, self.page_size, self.dtype)
        lengths = ((2048,) * 64,) if op == "paged_decode_attention" else ((2048,), (2048,))
        options = OPTIONS if self.has_options else {}
        return programs.CASES[op].Case(str(self), heads, *lengths, options=options)


def shapes() -> list[Shape]:
    """Every page size, group and dtype, and the options, each with every head_dim."""
    varied: list[dict[str, Any]] = [
        *({"page_size": page_size} for page_size in PAGE_SIZES),
        *({"group": group} for group in GROUPS),
        *({"dtype": dtype} for dtype in DTYPES),
        {"has_options": True},
    ]
    return list(dict.fromkeys(Shape(head_dim, **v) for head_dim in HEAD_DIMS for v in varied))


def implementation_for(gpu: GpuName) -> str:
    """That the GPU is meant for: of Mosaic on Hopper, of Triton elsewhere."""
    return "triton" if gpu == "a100" else "mosaic_gpu"


def compile_all(gpu: GpuName, op: str, *, jobs: int) -> list[table.Row]:
    """Each shape of the op, compiled in a process of its own."""
    limits = DescribedGpu(gpu).limits
    implementation = implementation_for(gpu)

    def row(shape: Shape) -> table.Row:
        names = op, implementation, str(shape)
        args = op, implementation, asdict(shape)
        try:
            report = compile_in_child(gpu, f"{__spec__.name}:kernel", args)
        except CompileError as error:
            return table.Row(names, None, (str(error),))
        return table.Row(names, report, tuple(kernel_faults(report.pallas_kernels, limits)))

    with ThreadPoolExecutor(jobs) as executor:
        return list(executor.map(row, shapes()))


def kernel(op: str, implementation: str, *fields: dict[str, Any]) -> programs.Program:
    """The op on one shape, or on several in one program."""
    return programs.kernel_of(op, implementation, *(Shape(**shape).case(op) for shape in fields))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot.sweep", description="Compile the attention kernels."
    )
    parser.add_argument("--target", choices=["h100", "h200", "a100"], default="h100")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = [row for op in args.ops for row in compile_all(args.target, op, jobs=args.jobs)]
    print(f"compiled for {args.target}, not run\n")
    table.print_kernels(args.target, rows)
    table.print_faults(rows)
    if args.json:
        found = {"target": args.target, "kernels": [row.as_json() for row in rows]}
        common.write_json(args.json, common.header(vars(args)) | found)
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
