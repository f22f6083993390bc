import functools
import itertools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import paged_decode_attention, paged_prefill_attention
from kernels_pallas.cases import Heads, normal
from kernels_pallas.paged_prefill_attention.cases import TESTS

CHUNKS, PAGES_PER_ROW, PAGE_SIZE, POOL = 3, 20, 8, 30
CAPACITY = PAGES_PER_ROW * PAGE_SIZE


jitted_decode = jax.jit(paged_decode_attention)


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(paged_prefill_attention, **options))


@functools.cache
def arrays(num_tokens, num_heads, kv_heads):
    rng = np.random.default_rng(0)
    heads = Heads(num_heads, kv_heads, 16, PAGE_SIZE)
    q = normal(rng, (num_tokens, num_heads, heads.head_dim), "float32")
    return q, *(normal(rng, (POOL, *heads.page_shape), "float32") for _ in range(2))


@st.composite
def ragged(draw, num_tokens):
    """(q_lens, context_lens) of CHUNKS chunks of at most num_tokens together."""
    q_lens, left = [], num_tokens
    for _ in range(CHUNKS):
        q_lens.append(draw(st.integers(0, left)))
        left -= q_lens[-1]
    edges = st.sampled_from([0, 1, PAGE_SIZE - 1, PAGE_SIZE, 63, 64, 65, CAPACITY])
    histories = draw(st.lists(st.integers(0, CAPACITY) | edges, min_size=CHUNKS, max_size=CHUNKS))
    return q_lens, [min(q + h, CAPACITY) for q, h in zip(q_lens, histories, strict=True)]


def cumulative(q_lens):
    return jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)


@pytest.mark.parametrize("case", TESTS, ids=lambda case: case.name)
def test_case(case):
    inputs = case.inputs()
    result = jitted(**case.options)(*inputs)
    oracle.assert_matches(result, oracle.prefill(*inputs, **case.options))


@pytest.mark.parametrize("num_tokens", [48, 90])
@pytest.mark.parametrize("options", [{}, {"window": 11, "soft_cap": 1.5}], ids=["plain", "window"])
@settings(max_examples=25)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_any_chunks_and_any_pages(num_tokens, options, data, seed):
    """Chunks may share pages, and what lies past their end is whatever the page holds."""
    q_lens, context_lens = data.draw(ragged(num_tokens))
    table = np.random.default_rng(seed).integers(0, POOL, (CHUNKS, PAGES_PER_ROW))
    rows = (cumulative(q_lens), jnp.asarray(table, jnp.int32), jnp.asarray(context_lens))
    inputs = (*arrays(num_tokens, 4, 2), *rows)
    result = jitted(**options)(*inputs)
    oracle.assert_matches(result, oracle.prefill(*inputs, **options))


@settings(max_examples=10)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_a_prompt_in_chunks_is_the_prompt_in_one(chunk_lens):
    ends = [0, *(end for end in np.cumsum(chunk_lens) if end < CAPACITY), CAPACITY]
    q, k_pages, v_pages = arrays(CAPACITY, 4, 2)
    q = np.asarray(q)
    table = jnp.asarray(np.random.default_rng(0).permutation(POOL)[None, :PAGES_PER_ROW], jnp.int32)

    def prefill(queries, start, end):
        padded = np.zeros_like(q)
        padded[: end - start] = queries
        lens = cumulative([end - start]), table, jnp.asarray([end], jnp.int32)
        out, lse = jitted(window=70)(jnp.asarray(padded), k_pages, v_pages, *lens)
        return np.asarray(out)[: end - start], np.asarray(lse)[: end - start]

    whole = prefill(q, 0, CAPACITY)
    pieces = [prefill(q[a:b], int(a), int(b)) for a, b in itertools.pairwise(ends)]
    for got, want in zip(zip(*pieces, strict=True), whole, strict=True):
        np.testing.assert_allclose(np.concatenate(got), want, rtol=1e-5, atol=1e-5)


@settings(max_examples=10)
@given(ragged(90))
def test_last_token_of_a_chunk_is_a_decode_step(chunks):
    q_lens, context_lens = chunks
    q, k_pages, v_pages = arrays(90, 4, 2)
    cu_q_lens = cumulative(q_lens)
    table = jnp.asarray(
        np.random.default_rng(1).integers(0, POOL, (CHUNKS, PAGES_PER_ROW)), jnp.int32
    )
    lens = jnp.asarray(context_lens)
    out, lse = jitted()(q, k_pages, v_pages, cu_q_lens, table, lens)
    chosen = np.flatnonzero(q_lens)
    last = np.asarray(cu_q_lens)[1:][chosen] - 1
    decode_q = np.zeros((CHUNKS, *q.shape[1:]), np.float32)
    decode_q[chosen] = np.asarray(q)[last]
    decoded = jitted_decode(jnp.asarray(decode_q), k_pages, v_pages, table, lens)
    for got, want in zip((out, lse), decoded, strict=True):
        np.testing.assert_allclose(
            np.asarray(got)[last], np.asarray(want)[chosen], rtol=1e-5, atol=1e-5
        )


def test_only_visible_slots_matter():
    q, k_pages, v_pages = arrays(90, 4, 2)
    table = np.zeros((CHUNKS, PAGES_PER_ROW), np.int32)
    table[0, :5], table[1, :3] = range(1, 6), range(6, 9)
    q_lens, context_lens = [20, 24, 0], np.array([37, 24, 9], np.int32)
    rows = (cumulative(q_lens), jnp.asarray(table), jnp.asarray(context_lens))
    expected = jitted()(q, k_pages, v_pages, *rows)

    hidden = np.ones((POOL, PAGE_SIZE), bool)
    hidden[1:6] = (np.arange(40) >= 37).reshape(5, PAGE_SIZE)
    hidden[6:9] = False
    hidden = jnp.asarray(hidden)[:, None, :, None]
    worst = np.finfo(np.float32).max
    spoiled = jnp.where(hidden, worst, k_pages), jnp.where(hidden, -worst, v_pages)
    for got, want in zip(jitted()(q, *spoiled, *rows), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_memory_does_not_grow_with_the_longest_context():
    def temp_bytes(pages_per_row):
        table = jnp.zeros((CHUNKS, pages_per_row), jnp.int32)
        rows = cumulative([0] * CHUNKS), table, jnp.zeros(CHUNKS, jnp.int32)
        lowered = jitted().lower(*arrays(90, 4, 2), *rows)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(PAGES_PER_ROW * 100) <= temp_bytes(PAGES_PER_ROW)
