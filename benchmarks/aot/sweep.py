"""The attention kernels at every page size, head_dim, group and dtype that they are for.

    python -m benchmarks.aot.sweep --target a100 --json benchmarks/results/sweep-a100.json

Each is compiled, not run, in a process of its own; the table says registers, spills, shared memory
and thread blocks per SM. The status is 1 if a gate fails.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from benchmarks import common
from benchmarks.aot import programs, table
from benchmarks.aot.child import CompileError, compile_in_child
from benchmarks.aot.gates import kernel_faults
from kernels_pallas.cases import Heads
from semipd_jax.runtime.described_gpu import DescribedGpu, GpuName

PAGE_SIZES: Final = (16, 32, 64, 128)
HEAD_DIMS: Final = (64, 96, 128, 256)
GROUPS: Final = (1, 4, 7, 16)
KV_HEADS: Final = 8
OPS: Final = ("paged_decode_attention", "paged_prefill_attention")


def shapes() -> Iterator[Heads]:
    """Every page size with every head_dim, and every group and dtype with every head_dim."""

    def heads(head_dim: int, *, group: int = 4, page_size: int = 64, dtype: str = "bfloat16"):
        return Heads(group * KV_HEADS, KV_HEADS, head_dim, page_size, dtype)

    for head_dim in HEAD_DIMS:
        yield from (heads(head_dim, page_size=page_size) for page_size in PAGE_SIZES)
        yield from (heads(head_dim, group=group) for group in GROUPS if group != 4)
        yield heads(head_dim, dtype="float16")


def compile_all(gpu: GpuName, op: str, *, jobs: int) -> list[table.Row]:
    """The kernels that the GPU is meant for: of Mosaic on Hopper, of Triton elsewhere."""
    limits = DescribedGpu(gpu).limits
    implementation = "triton" if gpu == "a100" else "mosaic_gpu"

    def row(heads: Heads) -> table.Row:
        name = f"head_dim {heads.head_dim}, page {heads.page_size}"
        name += f", group {heads.num_heads // heads.kv_heads}, {heads.dtype}"
        args = op, implementation, heads.num_heads, heads.head_dim, heads.page_size, heads.dtype
        try:
            report = compile_in_child(gpu, f"{__spec__.name}:kernel", args)
        except CompileError as error:
            return table.Row((op, implementation, name), None, (str(error),))
        faults = tuple(kernel_faults(report.pallas_kernels, limits))
        return table.Row((op, implementation, name), report, faults)

    with ThreadPoolExecutor(jobs) as executor:
        return list(executor.map(row, shapes()))


def kernel(
    op: str, implementation: str, num_heads: int, head_dim: int, page_size: int, dtype: str
) -> programs.Program:
    """64 rows of 2048 tokens, or 2048 tokens after as many."""
    heads = Heads(num_heads, KV_HEADS, head_dim, page_size, dtype)
    lengths = ((2048,) * 64,) if op == "paged_decode_attention" else ((2048,), (2048,))
    return programs.kernel_of(op, implementation, programs.CASES[op].Case("", heads, *lengths))


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
