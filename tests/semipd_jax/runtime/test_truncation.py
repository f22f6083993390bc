import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from semipd_jax.runtime import truncation

threshold = jax.jit(truncation.threshold)


def kept_by_sorting(scores, top_k, top_p, min_p):
    """One row, in float64: what a full sort keeps. None if rounding decides what min-p or top-p
    cuts."""
    order = np.argsort(-scores, kind="stable")
    probs = np.exp(scores.astype(np.float64))[order]
    if 0 < min_p < 1 and np.abs(probs / (min_p * probs[0]) - 1).min() < 1e-5:
        return None
    kept = probs >= min_p * probs[0]
    if top_k > 0:
        kept &= scores[order] >= scores[order][min(top_k, len(scores)) - 1]
    cumulative = np.cumsum(np.where(kept, probs, 0)) / probs[kept].sum()
    if top_p < 1:
        cut = np.argmax(cumulative >= top_p)
        if np.abs(cumulative - top_p).min() < 1e-5:
            return None
        kept &= scores[order] >= scores[order][cut]
    result = np.zeros(len(scores), bool)
    result[order[kept]] = True
    return result


def row_scores(rng, size, spread):
    logits = (rng.normal(size=size) * spread).astype(np.float32)
    return logits - logits.max()


def kept(scores, top_k, top_p, min_p):
    least = threshold(
        jnp.asarray(scores),
        jnp.exp(jnp.asarray(scores)),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(min_p, jnp.float32),
    )
    return scores >= np.asarray(least)[:, None]


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([5, 64, 1000]),
    spread=st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    top_k=st.sampled_from([0, 1, 3, 63, 64, 65, 200, 5000]),
    top_p=st.sampled_from([1.0, 1e-6, 0.3, 0.95, 0.9999]),
    min_p=st.sampled_from([0.0, 1.0, 0.02, 0.4]),
)
@settings(max_examples=150)
def test_keeps_what_a_full_sort_keeps(seed, size, spread, top_k, top_p, min_p):
    scores = row_scores(np.random.default_rng(seed), size, spread)
    expected = kept_by_sorting(scores, top_k, top_p, min_p)
    assume(expected is not None)
    got = kept(scores[None], [top_k], [top_p], [min_p])[0]
    possible = np.exp(scores) > 0
    np.testing.assert_array_equal(got & possible, expected & possible)


def test_rows_do_not_influence_each_other():
    rng = np.random.default_rng(1)
    scores = np.stack([row_scores(rng, 700, s) for s in (0.01, 1, 3, 10)])
    top_k, top_p, min_p = [0, 500, 5, 0], [0.9, 1.0, 0.7, 0.99], [0.0, 0.0, 0.0, 0.05]
    together = kept(scores, top_k, top_p, min_p)
    for i in range(4):
        alone = kept(scores[i : i + 1], top_k[i : i + 1], top_p[i : i + 1], min_p[i : i + 1])[0]
        np.testing.assert_array_equal(together[i], alone)


def test_ties_at_the_threshold_are_all_kept():
    scores = np.array([[0, -1, -1, -1, -2]], np.float32)
    assert kept(scores, [2], [1.0], [0.0]).sum() == 4


def test_forbidden_tokens_stay_out():
    scores = np.where(np.arange(100) % 2, -np.inf, np.arange(100) / 10 - 9.8)[None]
    scores = scores.astype(np.float32)
    assert kept(scores, [50], [0.999999], [0.0])[0, 1::2].sum() == 0


@pytest.mark.parametrize("top_k", [0, 10**6])
def test_nothing_is_dropped_when_everything_is_off(top_k):
    scores = row_scores(np.random.default_rng(2), 300, 3.0)[None]
    assert kept(scores, [top_k], [1.0], [0.0]).all()
