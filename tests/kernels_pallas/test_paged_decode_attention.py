import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import paged_decode_attention
from kernels_pallas.cases import Heads, normal
from kernels_pallas.paged_decode_attention.cases import TESTS

ROWS, PAGES_PER_ROW, PAGE_SIZE, POOL = 5, 20, 8, 30
CAPACITY = PAGES_PER_ROW * PAGE_SIZE
lengths = st.one_of(
    st.sampled_from([0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 63, 64, 65, CAPACITY]),
    st.integers(0, CAPACITY),
)


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(paged_decode_attention, **options))


@functools.cache
def pool(num_heads, kv_heads):
    rng = np.random.default_rng(0)
    heads = Heads(num_heads, kv_heads, 16, PAGE_SIZE)
    q = normal(rng, (ROWS, num_heads, heads.head_dim), "float32")
    return q, *(normal(rng, (POOL, *heads.page_shape), "float32") for _ in range(2))


@pytest.mark.parametrize("case", TESTS, ids=lambda case: case.name)
def test_case(case):
    inputs = case.inputs()
    result = jitted(**case.options)(*inputs)
    oracle.assert_matches(result, oracle.decode(*inputs, **case.options))


@pytest.mark.parametrize("num_heads", [2, 4])
@pytest.mark.parametrize("options", [{}, {"window": 11, "soft_cap": 1.5}], ids=["plain", "window"])
@settings(max_examples=25)
@given(
    st.lists(lengths, min_size=ROWS, max_size=ROWS),
    st.integers(0, 2**32 - 1),
)
def test_any_lengths_and_any_pages(num_heads, options, context_lens, seed):
    """Rows may share pages, and what lies past their end is whatever the page holds."""
    q, k_pages, v_pages = pool(num_heads, 2)
    table = np.random.default_rng(seed).integers(0, POOL, (ROWS, PAGES_PER_ROW))
    inputs = (q, k_pages, v_pages, jnp.asarray(table, jnp.int32), jnp.asarray(context_lens))
    result = jitted(**options)(*inputs)
    oracle.assert_matches(result, oracle.decode(*inputs, **options))


@pytest.mark.parametrize("num_heads", [2, 4])
def test_only_visible_slots_matter(num_heads):
    q, k_pages, v_pages = pool(num_heads, 2)
    table = np.arange(1, 1 + ROWS * 5, dtype=np.int32).reshape(ROWS, 5)
    table = jnp.asarray(np.pad(table, ((0, 0), (0, PAGES_PER_ROW - 5))))
    context_lens = np.array([1, 8, 20, 39, 40], np.int32)
    options = {"window": 11, "soft_cap": 1.5}
    inputs = (q, k_pages, v_pages, table, jnp.asarray(context_lens))
    expected = jitted(**options)(*inputs)

    slots = np.arange(5 * PAGE_SIZE)[None]
    hidden = (slots >= context_lens[:, None]) | (slots < context_lens[:, None] - 11)
    hidden = np.concatenate([np.ones((1, 8)), hidden.reshape(-1, PAGE_SIZE), np.ones((4, 8))])
    hidden = jnp.asarray(hidden, bool)[:, None, :, None]
    worst = np.finfo(np.float32).max
    spoiled = (q, jnp.where(hidden, worst, k_pages), jnp.where(hidden, -worst, v_pages))
    result = jitted(**options)(*spoiled, table, jnp.asarray(context_lens))
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_padding_rows_read_nothing():
    q, k_pages, _ = pool(4, 2)
    nothing = jnp.full_like(k_pages, jnp.nan)
    table = jnp.zeros((ROWS, PAGES_PER_ROW), jnp.int32)
    out, lse = jitted()(q, nothing, nothing, table, jnp.zeros(ROWS, jnp.int32))
    assert not out.any()
    assert (lse == -jnp.inf).all()


@pytest.mark.parametrize("num_heads", [2, 4])
def test_memory_does_not_grow_with_the_longest_context(num_heads):
    def temp_bytes(pages_per_row):
        table = jnp.zeros((ROWS, pages_per_row), jnp.int32)
        lowered = jitted().lower(*pool(num_heads, 2), table, jnp.zeros(ROWS, jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(PAGES_PER_ROW * 100) <= temp_bytes(PAGES_PER_ROW)
