"""The GPU kernels of paged decode attention, interpreted."""

import dataclasses
import functools
from unittest import mock

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pallas_interpret import RaceError, run_mosaic, run_triton

from kernels_pallas import paged_decode_attention
from kernels_pallas.cases import Heads, normal
from kernels_pallas.checks import UnsupportedError
from kernels_pallas.compat import plgpu
from kernels_pallas.paged_decode_attention import mosaic_gpu, mosaic_gpu_merge
from kernels_pallas.paged_decode_attention.cases import TESTS, Case

SUPPORTED = Heads(4, 2, 128, 64, "bfloat16")


def jitted(implementation, **options):
    """The op without its own `jit`, which would remember what a test patches."""
    op = functools.partial(paged_decode_attention.__wrapped__, implementation=implementation)
    return jax.jit(functools.partial(op, **options))


def on_hopper(case):
    """The case in the nearest shape that the Hopper kernel supports."""
    heads = dataclasses.replace(
        case.heads,
        dtype="bfloat16" if case.heads.dtype == "bfloat16" else "float16",
        head_dim=min(x for x in mosaic_gpu.HEAD_DIMS if x >= case.heads.head_dim),
        page_size=min(x for x in mosaic_gpu.PAGE_SIZES if x >= case.heads.page_size),
    )
    return dataclasses.replace(case, heads=heads)


def assert_matches(result, inputs, **options):
    """`result` is what float64 says, up to rounding: of the weights and of out to their dtype."""
    out, lse = result
    q, k_pages, v_pages, *rows = inputs
    expected, expected_lse = oracle.decode(*inputs, **options)
    absolute, _ = oracle.decode(q, k_pages, jnp.abs(v_pages), *rows, **options)
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert np.all(error <= oracle.HALF_ULP[q.dtype.name] * (np.abs(expected) + absolute) + 1e-5)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.fixture
def short_merge(monkeypatch):
    """Merges two parts at a time: a third of the interpreted program, and more steps."""
    monkeypatch.setattr(mosaic_gpu_merge, "MAX_UNROLL", 2)


@pytest.mark.parametrize("case", TESTS, ids=lambda case: case.name)
def test_triton_case(case):
    inputs = case.inputs()
    function = jitted("triton", **case.options)
    assert_matches(run_triton(function, *inputs), inputs, **case.options)


@pytest.mark.usefixtures("short_merge")
@pytest.mark.parametrize("case", [on_hopper(case) for case in TESTS], ids=lambda case: case.name)
def test_mosaic_case(case):
    inputs = case.inputs()
    function = jitted("mosaic_gpu", **case.options)
    assert_matches(run_mosaic(function, *inputs), inputs, **case.options)


@pytest.mark.parametrize(
    "case",
    [
        Case("group of 7", Heads(14, 2, 64, 16, "bfloat16"), (150, 0, 17)),
        Case("group of 20, in two parts", Heads(20, 1, 64, 128, "float16"), (129, 5)),
    ],
    ids=lambda case: case.name,
)
def test_mosaic_group(case):
    inputs = case.inputs()
    assert_matches(run_mosaic(jitted("mosaic_gpu"), *inputs), inputs)


ROWS, PAGES_PER_ROW, PAGE_SIZE, POOL = 3, 40, 16, 50
CAPACITY = PAGES_PER_ROW * PAGE_SIZE
lengths = st.one_of(
    st.sampled_from([0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 127, 128, 129, CAPACITY]),
    st.integers(0, CAPACITY),
)
CONFIGS = {
    "plain": (Heads(4, 2, 64, PAGE_SIZE, "float16"), {}),
    "window": (Heads(2, 2, 128, PAGE_SIZE, "bfloat16"), {"window": 70, "soft_cap": 1.5}),
}


@functools.cache
def pool(config):
    heads, options = CONFIGS[config]
    rng = np.random.default_rng(0)
    q = normal(rng, (ROWS, heads.num_heads, heads.head_dim), heads.dtype)
    pages = [normal(rng, (POOL, *heads.page_shape), heads.dtype) for _ in range(2)]
    run = {"mosaic_gpu": functools.partial(run_mosaic, num_sms=1), "triton": run_triton}
    run = {name: functools.partial(run[name], jitted(name, **options)) for name in run}
    return q, *pages, options, run


def check_any_lengths_and_any_pages(implementation, config, context_lens, seed):
    q, k_pages, v_pages, options, run = pool(config)
    table = np.random.default_rng(seed).integers(0, POOL, (ROWS, PAGES_PER_ROW))
    inputs = (q, k_pages, v_pages, jnp.asarray(table, jnp.int32), jnp.asarray(context_lens))
    assert_matches(run[implementation](*inputs), inputs, **options)


any_rows = given(
    st.lists(lengths, min_size=ROWS, max_size=ROWS),
    st.integers(0, 2**32 - 1),
)


@pytest.mark.usefixtures("short_merge")
@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=5)
@any_rows
def test_mosaic_with_any_lengths_and_any_pages(config, context_lens, seed):
    check_any_lengths_and_any_pages("mosaic_gpu", config, context_lens, seed)


@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=25)
@any_rows
def test_triton_with_any_lengths_and_any_pages(config, context_lens, seed):
    check_any_lengths_and_any_pages("triton", config, context_lens, seed)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_only_visible_pages_are_read(implementation):
    """Pages of NaN before the window, after the context and in padding rows change nothing."""
    context_lens = np.array([150, 0, 600], np.int32)
    q, k_pages, v_pages, options, run = pool("window")
    table = np.zeros((ROWS, PAGES_PER_ROW), np.int32)
    for row, length in enumerate(context_lens):
        first, end = max(length - options["window"], 0) // PAGE_SIZE, -(-length // PAGE_SIZE)
        table[row, first:end] = 1 + np.arange(end - first)
    inputs = (q, k_pages, v_pages, jnp.asarray(table), jnp.asarray(context_lens))
    spoiled = (q, k_pages.at[0].set(jnp.nan), v_pages.at[0].set(jnp.nan), *inputs[3:])
    for got, want in zip(run[implementation](*spoiled), run[implementation](*inputs), strict=True):
        np.testing.assert_array_equal(got, want)


FAULTS = [
    *(("barrier_wait", site) for site in ("queries", "K", "V", "queries' slot", "slot")),
    *(("commit_smem", site) for site in ("weights", "lse", "out")),
]
"""Synchronisations of the Hopper kernels, in the order in which each kind is traced."""


FAULTY = Case("short rows, then long", Heads(3, 3, 64, 64, "float16"), (100, 500))


def test_a_slot_is_reused_where_only_its_own_barrier_orders_that():
    """So a missing wait is a race, whatever the timing: no other barrier stands in for it.

    The first thread block has three segments of one block, then longer ones. The third's queries
    replace the first's before any copy has to wait for a tile. In the fourth segment a tile
    replaces the third's keys, when the last queries waited for were the second's.
    """
    q, k_pages, *_ = FAULTY.inputs()
    shape = mosaic_gpu.Shape.of(q, k_pages)
    short, long = (-(-length // shape.block) for length in FAULTY.context_lens)
    assert (short, shape.num_heads) == (1, 3)
    tiles_before, tiles = 2 * 3 * short, 2 * long  # of the fourth segment
    assert tiles_before <= shape.num_slots
    first_of_third = tiles_before - 2 * short
    assert tiles_before <= first_of_third + shape.num_slots < tiles_before + tiles
    assert 3 * (short + long) // shape.num_ctas_per_sm >= 3 * short + long


def run_without(name, site):
    inputs = FAULTY.inputs()
    calls = iter([site for kind, site in FAULTS if kind == name])
    synchronise = getattr(plgpu, name)

    def all_but_one(*args, **kwargs):
        if next(calls, None) != site:
            synchronise(*args, **kwargs)

    with mock.patch.object(plgpu, name, all_but_one):
        return run_mosaic(jitted("mosaic_gpu"), *inputs, num_sms=1)


@pytest.mark.usefixtures("short_merge")
def test_nothing_is_caught_where_nothing_is_missing():
    run_without("barrier_wait", "nowhere")


@pytest.mark.usefixtures("short_merge")
@pytest.mark.parametrize(("name", "site"), FAULTS)
def test_a_missing_synchronisation_is_caught(name, site):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run_without(name, site)
    # The interpreter reports a race, or a barrier that goes on before a thread has seen it.
    assert caught.type is RaceError or "barrier" in str(caught.value).lower()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("implementation", "field", "value", "message"),
    [
        ("mosaic_gpu", "dtype", "float32", "q.dtype is 'float32'; allowed: bfloat16, float16"),
        ("mosaic_gpu", "head_dim", 80, r"head_dim .* is 80; allowed: \(64, 96, 128, 256\)"),
        ("mosaic_gpu", "page_size", 8, r"page_size is 8; allowed: \(16, 32, 64, 128\)"),
        ("triton", "head_dim", 512, "head_dim .* is 512; allowed: at most 256"),
    ],
)
def test_what_an_implementation_lacks_is_named(implementation, field, value, message):
    heads = dataclasses.replace(SUPPORTED, **{field: value})
    with pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(jitted(implementation), *Case("", heads, (5,)).specs)
