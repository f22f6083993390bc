"""The kernels and the engine's whole steps, compiled for GPUs that are not here, pass all gates."""

from dataclasses import asdict

import pytest

from benchmarks.aot import programs, sweep
from benchmarks.aot.child import compile_in_child
from benchmarks.aot.gates import kernel_faults, operand_faults, step_faults
from semipd_jax.runtime.described_gpu import DescribedGpu

LAYERS = {"h100": 32, "a100": 4}
"""Of the steps: all of Llama 3.1 8B where its kernels are at home."""

KERNELS = [
    *(
        ("paged_decode_attention", name)
        for name in ("64 rows of 2k", "64 rows of 2k, head_dim 256")
    ),
    *(("paged_prefill_attention", name) for name in ("8k tokens", "8k tokens, head_dim 256")),
]
"""The rest of the cases is compiled by `benchmarks.kernels --compile-only`."""


@pytest.mark.parametrize(("gpu", "implementation"), [("h100", "mosaic_gpu"), ("a100", "triton")])
@pytest.mark.parametrize(("op", "case"), KERNELS)
def test_kernels_spill_nothing_and_fit(gpu, implementation, op, case):
    report = compile_in_child(gpu, f"{programs.__name__}:kernel", (op, implementation, case))
    assert not list(kernel_faults(report.pallas_kernels, DescribedGpu(gpu).limits))


SHAPES = [
    sweep.Shape(head_dim, group=group, has_options=True)
    for head_dim in sweep.HEAD_DIMS
    for group in (1, 4, 16, 64)
]
"""Those of the sweep that need the most registers: page size and dtype make no difference."""


@pytest.mark.parametrize("op", sweep.OPS)
def test_no_shape_spills_on_an_a100(op):
    args = (op, "triton", *map(asdict, SHAPES))
    report = compile_in_child("a100", f"{sweep.__name__}:kernel", args)
    kernels = [kernel for kernel in report.pallas_kernels if kernel.name.startswith(op)]
    assert len(kernels) == len(SHAPES)
    assert not list(kernel_faults(report.pallas_kernels, DescribedGpu("a100").limits))


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_rope_kv_write_is_one_kernel_that_writes_in_place(gpu):
    args = ("rope_kv_write", "triton", "64 rows, norms")
    report = compile_in_child(gpu, f"{programs.__name__}:kernel", args)
    pages = programs.find_case(args[0], args[2]).specs[3]
    assert [kernel.name for kernel in report.kernels] == ["rope_kv_write"]
    assert not list(kernel_faults(report.pallas_kernels, DescribedGpu(gpu).limits))
    assert report.alias_bytes == 2 * pages.size * pages.dtype.itemsize
    assert not report.copies
    assert not report.temp_bytes


@pytest.mark.parametrize("op", ["paged_decode_attention", "paged_prefill_attention"])
def test_kernels_read_no_operand_from_inside_an_array(op):
    report = compile_in_child("h100", "aot_programs:attention_of_a_packed_batch", (op,))
    assert report.pallas_kernels
    assert not list(operand_faults(report))


@pytest.mark.parametrize("gpu", LAYERS)
@pytest.mark.parametrize("kind", programs.BUCKETS)
def test_steps_stay_in_place_in_one_cuda_graph(gpu, kind):
    report = compile_in_child(gpu, f"{programs.__name__}:step", (kind, LAYERS[gpu]))
    pool = programs.pool_of(programs.state(programs.llama(LAYERS[gpu])))
    names = [kernel.name for kernel in report.pallas_kernels]
    assert len(set(names)) == len(names), "layers share their kernels"
    assert not step_faults(report, pool, DescribedGpu(gpu).limits)
