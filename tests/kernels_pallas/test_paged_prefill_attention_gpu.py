"""The GPU kernels of paged prefill attention, interpreted, and the tiles that they share."""

import dataclasses
import functools
import sys
from unittest import mock

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pallas_interpret import run_mosaic, run_triton

from kernels_pallas.cases import Heads
from kernels_pallas.checks import UnsupportedError
from kernels_pallas.compat import plgpu, tiled_smem
from kernels_pallas.paged_prefill_attention import IMPLEMENTATIONS, mosaic_gpu
from kernels_pallas.paged_prefill_attention.cases import TESTS, Case
from kernels_pallas.paged_prefill_attention.tiles import Tile, cut


def kernel(implementation, *, scale=None, window=None, soft_cap=None):
    def call(q, *args):
        options = {"window": window, "soft_cap": soft_cap}
        options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
        return IMPLEMENTATIONS[implementation](q, *args, **options)

    return call


@functools.cache
def triton(**options):
    return jax.jit(kernel("triton", **options))


def mosaic(**options):
    # Not in `jit`: the interpreter's threads would wait for the one that it occupies.
    return kernel("mosaic_gpu", **options)


def in_16_bits(case):
    dtype = "bfloat16" if case.heads.dtype == "bfloat16" else "float16"
    return dataclasses.replace(case, heads=dataclasses.replace(case.heads, dtype=dtype))


TESTS_16_BIT = tuple(in_16_bits(case) for case in TESTS)
TESTS_HOPPER = tuple(
    case
    for case in TESTS_16_BIT
    if case.heads.head_dim in mosaic_gpu.HEAD_DIMS and case.heads.page_size in mosaic_gpu.PAGE_SIZES
)


def assert_matches(result, inputs, **options):
    """`result` is what float64 says, up to rounding: of the weights and of out to 16 bits."""
    out, lse = (np.asarray(x, np.float64) for x in result)
    q, k_pages, v_pages, *rows = inputs
    expected_out, expected_lse = oracle.prefill(*inputs, **options)
    absolute, _ = oracle.prefill(q, k_pages, jnp.abs(v_pages), *rows, **options)
    error = np.abs(out - expected_out)
    assert np.all(error <= oracle.HALF_ULP[q.dtype.name] * (np.abs(expected_out) + absolute) + 1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", TESTS_16_BIT, ids=lambda case: case.name)
def test_triton_case(case):
    inputs = case.inputs()
    result = run_triton(triton(**case.options), *inputs)
    assert_matches(result, inputs, **case.options)


@pytest.mark.parametrize("case", TESTS_HOPPER, ids=lambda case: case.name)
def test_mosaic_case(case):
    inputs = case.inputs()
    result = run_mosaic(mosaic(**case.options), *inputs)
    assert_matches(result, inputs, **case.options)


TOKENS, PAGE_SIZE, PAGES_PER_ROW, POOL = 24, 16, 9, 12
HEADS = Heads(4, 1, 64, PAGE_SIZE, "float16")


@st.composite
def batches(draw):
    """(cu_q_lens, page_table, context_lens): chunks with pages in common, and padding."""
    cuts = sorted(draw(st.lists(st.integers(0, TOKENS), min_size=3, max_size=3)))
    q_lens = np.diff([0, *cuts])
    edges = st.sampled_from([0, 1, PAGE_SIZE - 1, PAGE_SIZE, 127, 128])
    most = PAGES_PER_ROW * PAGE_SIZE
    histories = draw(st.lists(edges | st.integers(0, most), min_size=3, max_size=3))
    lens = np.minimum(q_lens + histories, most)
    table = np.random.default_rng(draw(st.integers(0, 99))).integers(0, POOL, (3, PAGES_PER_ROW))
    rows = (np.array([0, *cuts]), table, lens)
    return [jnp.asarray(x, jnp.int32) for x in rows]


@functools.cache
def arrays():
    case = Case("", HEADS, (TOKENS,), ((POOL - 1) * PAGE_SIZE - TOKENS,))
    return case.inputs()[:3]


@pytest.mark.parametrize("options", [{}, {"window": 21, "soft_cap": 1.5}], ids=["plain", "window"])
@settings(max_examples=12)
@given(batches())
def test_triton_any_batch(options, rows):
    inputs = (*arrays(), *rows)
    result = run_triton(triton(**options), *inputs)
    assert_matches(result, inputs, **options)


@pytest.mark.parametrize("options", [{}, {"window": 21}], ids=["plain", "window"])
@settings(max_examples=2)
@given(batches())
def test_mosaic_any_batch(options, rows):
    inputs = (*arrays(), *rows)
    result = run_mosaic(mosaic(**options), *inputs)
    assert_matches(result, inputs, **options)


LONG = Case("four blocks in a ring of two", Heads(1, 1, 256, 64, "float16"), (5,), (240,))


def test_a_ring_wraps_in_the_case_with_faults():
    shape = mosaic_gpu.Shape(1, LONG.heads.head_dim, LONG.heads.page_size)
    assert LONG.context_lens[0] > shape.stages * shape.block


@pytest.mark.parametrize(
    ("operation", "place"),
    [
        ("barrier_wait", "await_next_keys"),
        ("barrier_wait", "await_first_keys_and_queries"),
        ("barrier_wait", "attend_block"),
        ("barrier_wait", "fetch_pages"),
        ("commit_smem", "write"),
        ("wait_smem_to_gmem", "write"),
    ],
)
def test_a_missing_synchronisation_is_caught(operation, place):
    """As a race, as a barrier that nobody waited for or that is phases ahead of who does, or as a
    copy still running at the end: which of them depends on the threads' pace."""
    original = getattr(plgpu, operation)
    dropped = []

    def drop(*args, **kwargs):
        # `turn`, which is not indexed, only orders the warpgroups for speed.
        in_place = sys._getframe(1).f_code.co_name == place
        if in_place and not any(isinstance(arg, jax.Ref) for arg in args):
            dropped.append(args)
        else:
            original(*args, **kwargs)

    inputs = LONG.inputs()
    caught = (
        "RACE DETECTED|see stdout|no threads observed|already at phase|Not all copy_smem_to_gmem"
    )
    with mock.patch.object(plgpu, operation, drop), pytest.raises(Exception, match=caught):
        run_mosaic(mosaic(), *inputs)
    assert dropped


def test_the_case_with_faults_has_none_itself():
    inputs = LONG.inputs()
    assert_matches(run_mosaic(mosaic(), *inputs), inputs)


def test_rows_that_tma_cannot_copy_one_by_one_are_refused():
    with pytest.raises(ValueError, match="1 rows have 192 bytes; allowed: multiples of 128"):
        tiled_smem((64, 96), "float16", swizzle=64, rows=1)
    for head_dim in mosaic_gpu.HEAD_DIMS:
        shape = mosaic_gpu.Shape(1, head_dim, 64)
        assert shape.value_dim % shape.width == 0
        tiled_smem((64, shape.width), "float16", rows=1)


@pytest.mark.parametrize(
    ("implementation", "heads", "name"),
    [
        ("mosaic_gpu", Heads(2, 1, 32, 16, "float16"), "head_dim"),
        ("mosaic_gpu", Heads(2, 1, 64, 8, "float16"), "page_size"),
        ("mosaic_gpu", Heads(2, 1, 64, 16, "float32"), r"q\.dtype"),
        ("triton", Heads(2, 1, 512, 16, "float16"), "head_dim"),
        ("triton", Heads(2, 1, 64, 16, "float32"), r"q\.dtype"),
    ],
)
def test_what_is_not_supported_is_named(implementation, heads, name):
    specs = Case("", heads, (3,), (0,)).specs
    with pytest.raises(UnsupportedError, match=rf"{name} is .*; allowed: "):
        jax.eval_shape(kernel(implementation), *specs)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("window", [None, 5])
@settings(max_examples=40)
@given(data=st.data())
def test_tiles_cover_every_token_once_and_every_key_that_it_sees(align, window, data):
    num_tokens, tile, block = 40, 16, 8
    cuts = sorted(data.draw(st.lists(st.integers(0, num_tokens), min_size=6, max_size=6)))
    histories = data.draw(st.lists(st.integers(0, 50), min_size=6, max_size=6))
    cu_q_lens = np.array([0, *cuts])
    context_lens = np.diff(cu_q_lens) + histories
    tiles = _cut(align, window)(jnp.asarray(cu_q_lens, jnp.int32), jnp.asarray(context_lens))
    used = [
        tile
        for tile in map(Tile._make, np.asarray(tiles.table))
        if tile.start_token < tile.end_token
    ]

    lengths = [t.end_block - t.first_block for t in used]
    assert lengths == sorted(lengths, reverse=True)
    assert all(t.first_token % align == 0 for t in used)
    covered = [
        token
        for t in used
        for token in range(
            max(t.first_token, t.start_token), min(t.first_token + tile, t.end_token)
        )
    ]
    assert sorted(covered) == list(range(num_tokens))

    for token in range(num_tokens):
        t = used[tiles.of_token[token]]
        assert t.start_token <= token < t.end_token
        assert t.first_token + tiles.offset[token] == token
        row = np.searchsorted(cu_q_lens, token, side="right") - 1
        assert t.row == row
        if row == len(context_lens):  # padding
            assert t.end_block == t.first_block
            continue
        position = context_lens[row] - (cu_q_lens[row + 1] - token)
        assert t.position + tiles.offset[token] == position
        first_key = 0 if window is None else max(0, position - window + 1)
        assert t.first_block <= first_key // block <= position // block < t.end_block


@functools.cache
def _cut(align, window):
    return jax.jit(
        functools.partial(cut, num_tokens=40, tile=16, align=align, block=8, window=window)
    )
