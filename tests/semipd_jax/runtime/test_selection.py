import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from semipd_jax.runtime import selection

argmax = jax.jit(selection.argmax)
categorical = jax.jit(selection.categorical)
top_k = jax.jit(selection.top_k, static_argnums=1)

ALMOST_ONE = np.float32(1 - 2**-24)


@given(st.sampled_from([1, 5, 64, 100, 256, 640, 1000]), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_argmax_is_the_first_largest(size, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 3, (3, size)).astype(np.float32)
    x[0] = -np.inf
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), np.argmax(x, axis=1))


@given(
    st.sampled_from([(5, 5), (90, 20), (640, 2), (700, 3), (4097, 20), (9000, 64)]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_top_k_is_the_head_of_a_stable_sort(size_k, seed):
    size, k = size_k
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, rng.choice([-1, 4, 3000]), (3, size)).astype(np.float32)
    x[0, : size - k // 2] = -np.inf
    values, ids = top_k(jnp.asarray(x), k)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))


@pytest.mark.parametrize("size", [3, 64, 300, 1024, 1025])
def test_cumulative_sums(size):
    x = np.random.default_rng(size).random((4, size), np.float32)
    np.testing.assert_allclose(
        selection.cumulative(jnp.asarray(x)), np.cumsum(x.astype(np.float64), axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("size", [7, 300, 2000])
def test_categorical_follows_the_weights(size):
    rng = np.random.default_rng(size)
    num_draws = 40_000
    weights = rng.exponential(size=size).astype(np.float32)
    weights[rng.permutation(size)[: size // 2]] = 0
    u, v = rng.random((2, num_draws), np.float32)
    drawn = categorical(
        jnp.broadcast_to(weights[None], (num_draws, size)), jnp.asarray(u), jnp.asarray(v)
    )
    counts = np.bincount(drawn, minlength=size)
    assert not counts[weights == 0].any()
    likely = weights > 0
    expected = weights[likely] / weights[likely].sum(dtype=np.float64) * num_draws
    assert stats.chisquare(counts[likely], expected).pvalue > 1e-4


@given(st.sampled_from([2, 90, 512, 700]), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_categorical_never_picks_weight_zero(size, seed):
    rng = np.random.default_rng(seed)
    weights = np.zeros((4, size), np.float32)
    for row in weights:
        chosen = rng.permutation(size)[: rng.integers(1, 4)]
        row[chosen] = rng.choice([1e-30, 1e-7, 0.3, 1.0], len(chosen))
    u, v = rng.choice(np.array([0, 0.5, ALMOST_ONE], np.float32), (2, 4))
    drawn = np.asarray(categorical(jnp.asarray(weights), jnp.asarray(u), jnp.asarray(v)))
    assert (weights[np.arange(4), drawn] > 0).all()


def test_categorical_resolves_rare_tokens_of_a_large_vocabulary():
    """One token in 2**17 equal ones has less probability than a float32 step below 1 resolves."""
    size = 2**17
    rng = np.random.default_rng(0)
    weights = jnp.ones((200, size), jnp.float32)
    u, v = rng.random((2, 200), np.float32)
    drawn = np.asarray(categorical(weights, jnp.asarray(u), jnp.asarray(v)))
    assert len(set(drawn % 256)) > 100
    assert stats.kstest(drawn / size, "uniform").pvalue > 1e-4
