import itertools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import merge_attention, paged_decode_attention
from kernels_pallas.cases import Heads
from kernels_pallas.merge_attention.cases import TESTS
from kernels_pallas.paged_decode_attention.cases import Case

merge = jax.jit(merge_attention)
decode = jax.jit(paged_decode_attention)

WHOLE = Case("", Heads(4, 2, 16, 8), (200, 33, 8, 1, 0))


@pytest.mark.parametrize("case", TESTS, ids=lambda case: case.name)
def test_case(case):
    outs, lses = case.inputs()
    parts = np.asarray(lses, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        highest = np.nan_to_num(parts.max(axis=0), neginf=0.0)
        weights = np.exp(parts - highest)
        total = weights.sum(axis=0)
        out = np.nan_to_num((np.asarray(outs, np.float64) * (weights / total)[..., None]).sum(0))
        lse = np.log(total) + highest
    assert np.isinf(lse).any() == (case.shape[0] <= 2)
    oracle.assert_matches(merge(outs, lses), (out, lse))


@settings(max_examples=15)
@given(st.integers(0, 25), st.integers(0, 25))
def test_parts_of_a_context_make_the_whole(first_cut, second_cut):
    q, k_pages, v_pages, table, context_lens = WHOLE.inputs()
    cuts = [0, *sorted((first_cut, second_cut)), table.shape[1]]
    outs, lses = [], []
    for start, end in itertools.pairwise(cuts):
        part_table = np.roll(table, -start, axis=1)
        lens = np.clip(np.asarray(context_lens) - start * 8, 0, (end - start) * 8)
        out, lse = decode(q, k_pages, v_pages, jnp.asarray(part_table), jnp.asarray(lens))
        outs.append(out)
        lses.append(lse)
    merged = merge(jnp.stack(outs), jnp.stack(lses))
    oracle.assert_matches(merged, oracle.decode(*WHOLE.inputs()))


def test_an_empty_part_may_hold_anything_finite():
    outs = jnp.stack([jnp.full((3, 2, 4), np.finfo(np.float32).max), jnp.ones((3, 2, 4))])
    lses = jnp.stack([jnp.full((3, 2), -jnp.inf), jnp.full((3, 2), 5.0)])
    out, lse = merge(outs, lses)
    np.testing.assert_array_equal(out, outs[1])
    np.testing.assert_array_equal(lse, lses[1])
