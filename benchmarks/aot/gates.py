"""What a compiled program must be like. Each check says all that is wrong; nothing if all is well.

"Pool" is the KV cache of all layers, which another process writes too while a step runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.aot.report import Kernel, Report
from semipd_jax.runtime.described_gpu import Limits

_MAX_BLOCKS: Final = 32
_RESERVED_SHARED_BYTES: Final = 1024
_REGISTER_UNIT: Final = 256
_PARTITIONS: Final = 4
_MAX_SORTED: Final = 8192


@dataclass(frozen=True, slots=True)
class Pool:
    """Sizes in bytes of all arrays that a step updates in place.

    Attributes:
      total: of all.
      layer: of one layer's keys and values.
      smallest: of the smallest KV array.
    """

    total: int
    layer: int
    smallest: int


def blocks_per_sm(kernel: Kernel, limits: Limits) -> int:
    """Thread blocks of the kernel that an SM holds at once (CUDA occupancy calculator, cc 8 and 9).

    Registers are dealt to warps in units of 256, to warps of a quarter of the SM at a time; the
    system takes 1 KiB of shared memory per block.
    """
    if kernel.shared_bytes > limits.block_shared_bytes:
        return 0
    warps = -(-kernel.threads // 32)
    warp_registers = -(-kernel.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    warps_by_registers = _PARTITIONS * (limits.sm_registers // _PARTITIONS // warp_registers)
    return min(
        _MAX_BLOCKS,
        limits.sm_threads // (32 * warps),
        warps_by_registers // warps,
        limits.sm_shared_bytes // (kernel.shared_bytes + _RESERVED_SHARED_BYTES),
    )


def kernel_faults(kernels: Sequence[Kernel], limits: Limits) -> Iterator[str]:
    """Registers spilled, or too large for an SM."""
    if not kernels:
        yield "no Pallas kernel was compiled"
    for kernel in kernels:
        if kernel.spill_bytes:
            yield f"{kernel.name} spills {kernel.spill_bytes} bytes of registers"
        if kernel.shared_bytes > limits.block_shared_bytes:
            yield (
                f"{kernel.name} needs {kernel.shared_bytes} bytes of shared memory; a block can "
                f"have {limits.block_shared_bytes}"
            )
        elif blocks_per_sm(kernel, limits) < 1:
            yield f"{kernel.name}: {kernel.threads} threads of {kernel.registers} registers"


def in_place_faults(report: Report, pool: Pool) -> Iterator[str]:
    """The pool is not updated in place, or not it alone."""
    if report.alias_bytes < pool.total:
        yield f"{report.alias_bytes} of {pool.total} pool bytes are updated in place"
    if report.copies and report.copies[0] >= pool.smallest:
        yield f"copies {report.copies[0]} bytes; a KV array has {pool.smallest}"
    if report.temp_bytes >= pool.layer:
        yield f"{report.temp_bytes} bytes of temporaries; a layer's pool has {pool.layer}"


def operand_faults(report: Report) -> Iterator[str]:
    """A kernel may be launched on a misaligned operand: Mosaic refuses less than 256 bytes."""
    if report.num_sliced:
        yield f"{report.num_sliced} kernels read slices of other arrays, wherever those start"


def graph_faults(report: Report) -> Iterator[str]:
    """The host has more to start than one CUDA graph."""
    if report.launches != ("kCommandBuffer",):
        yield f"not one CUDA graph but: {', '.join(report.launches)}"


def sort_faults(report: Report) -> Iterator[str]:
    """Sampling sorts the vocabulary: what XLA makes of a `top_k` of its logits on a GPU."""
    if report.longest_sort > _MAX_SORTED:
        yield f"sorts rows of {report.longest_sort} items; allowed: {_MAX_SORTED}"


def step_faults(report: Report, pool: Pool, limits: Limits) -> list[str]:
    """All that is wrong with a step of the engine."""
    return [
        *kernel_faults(report.pallas_kernels, limits),
        *in_place_faults(report, pool),
        *operand_faults(report),
        *graph_faults(report),
        *sort_faults(report),
    ]
