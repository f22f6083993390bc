"""Each gate passes what is right and fails a program that is broken in just that way.

Every program is compiled to machine code for a GPU that is not here, in a process of its own.
"""

import aot_programs
import pytest

from benchmarks.aot.child import CompileError, compile_in_child
from benchmarks.aot.gates import (
    blocks_per_sm,
    graph_faults,
    in_place_faults,
    kernel_faults,
    operand_faults,
    sort_faults,
)
from benchmarks.aot.report import Kernel, Report
from semipd_jax.runtime.described_gpu import Limits

H100 = Limits(232448, 233472, 65536, 2048)
A100 = Limits(166912, 167936, 65536, 2048)


def compiled(name, *args, gpu="h100"):
    return compile_in_child(gpu, f"{aot_programs.__name__}:{name}", args)


def faults_of_kernels(report, limits=H100):
    return list(kernel_faults(report.pallas_kernels, limits))


def faults_of_pool(report):
    return list(in_place_faults(report, aot_programs.pool()))


def test_a_kernel_that_fits_passes():
    report = compiled("mosaic_adds_one", 64)
    assert not [*faults_of_kernels(report), *operand_faults(report)]
    (kernel,) = report.pallas_kernels
    assert (kernel.backend, kernel.threads) == ("mosaic", 128)
    assert 64 * 64 * 4 <= kernel.shared_bytes < 64 * 64 * 4 + 64


@pytest.mark.parametrize(("name", "arg"), [("mosaic_adds_one", 800), ("triton_multiplies", 1)])
def test_spilled_registers_fail(name, arg):
    (fault,) = faults_of_kernels(compiled(name, arg))
    assert "spills" in fault


def test_too_much_shared_memory_fails():
    """200 KiB: a Hopper GPU has them, an A100 does not, and only a launch would tell."""
    faults = faults_of_kernels(compiled("mosaic_adds_one", 800, gpu="a100"), A100)
    assert any("bytes of shared memory; a block can have 166912" in fault for fault in faults)


def test_a_program_without_kernels_fails():
    assert faults_of_kernels(compiled("updates_pools", "scatter")) == [
        "no Pallas kernel was compiled"
    ]


@pytest.mark.parametrize("write", ["scatter", "mosaic", "triton"])
def test_writes_in_place_pass(write):
    assert not faults_of_pool(compiled("guarded", write))


def test_a_pool_that_is_not_donated_fails():
    report = compiled("not_donated")
    assert f"0 of {aot_programs.pool().total} pool bytes" in faults_of_pool(report)[0]


def test_a_copied_pool_fails():
    faults = faults_of_pool(compiled("guarded", "kernel copies"))
    assert any("copies 536870912 bytes" in fault for fault in faults)


@pytest.mark.parametrize(
    ("name", "args"), [("guarded", ["transposed"]), ("scans_pools", [])], ids=str
)
def test_a_pool_sized_temporary_fails(name, args):
    (fault,) = faults_of_pool(compiled(name, *args))
    assert "bytes of temporaries" in fault


def test_a_step_in_pieces_fails():
    """With XLA's own settings a loop stays outside the CUDA graph."""
    report = compiled("scans_pools")
    assert list(graph_faults(report)) == [
        "not one CUDA graph but: kCopy, kCopy, kCustomKernel, kWhile"
    ]


def test_a_kernel_that_reads_from_inside_an_array_fails():
    (fault,) = operand_faults(compiled("mosaic_reads_a_slice"))
    assert fault.startswith("1 kernels read slices")


def test_a_sorted_vocabulary_fails():
    assert list(sort_faults(compiled("sorts_a_vocabulary"))) == [
        "sorts rows of 128256 items; allowed: 8192"
    ]


def test_a_program_that_does_not_compile_says_why():
    with pytest.raises(CompileError, match=r"exceeds available shared memory"):
        compiled("mosaic_adds_one", 920)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (32, 0, 64, 32),  # no more than 32 blocks
        (32, 0, 256, 8),  # 2048 threads
        (128, 0, 256, 2),  # 65536 registers
        (129, 0, 256, 1),
        (168, 198760, 384, 1),
        (255, 0, 256, 1),
        (40, 100 * 1024, 128, 2),  # 228 KiB of shared memory, one of them for each block
        (40, 113 * 1024, 128, 2),
        (40, 114 * 1024, 128, 1),
        (255, 0, 288, 0),  # of nine warps, a quarter of the SM would have to hold three
        (40, 232449, 128, 0),
    ],
)
def test_blocks_per_sm_of_a_hopper_gpu(registers, shared, threads, blocks):
    kernel = Kernel("k", "mosaic", registers, 0, shared, threads)
    assert blocks_per_sm(kernel, H100) == blocks
    assert bool(list(kernel_faults([kernel], H100))) == (blocks == 0)


def test_gates_read_reports_as_they_are():
    good = Report((), 0, 1000, 99, (49,), 0, 8192, ("kCommandBuffer",), 1.0)
    pool = aot_programs.Pool(total=1000, layer=100, smallest=50)
    faults = [in_place_faults(good, pool), operand_faults(good), graph_faults(good)]
    assert not [fault for found in [*faults, sort_faults(good)] for fault in found]
