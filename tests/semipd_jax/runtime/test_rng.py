import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from semipd_jax.runtime import rng

uniform_pair = jax.jit(rng.uniform_pair)


def draw(seeds, positions):
    u, v = uniform_pair(jnp.asarray(seeds, jnp.uint32), jnp.asarray(positions, jnp.int32))
    return np.asarray(u), np.asarray(v)


def test_known_answer_of_random123():
    zero = jnp.zeros((1,), jnp.uint32)
    first, second = jax.jit(rng._threefry_2x32)(zero, zero)
    assert (int(first[0]), int(second[0])) == (0x6B200159, 0x99BA4EFE)


def test_numbers_are_in_the_unit_interval_and_uniform():
    seeds, positions = np.meshgrid(np.arange(100), np.arange(400), indexing="ij")
    for numbers in draw(seeds.ravel(), positions.ravel()):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
        assert stats.chisquare(counts).pvalue > 1e-4


def test_neighbouring_seeds_and_positions_and_the_pair_are_independent():
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200), indexing="ij")
    u, v = draw(seeds.ravel(), positions.ravel())
    grid = u.reshape(200, 200)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid, v.reshape(200, 200))):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_depends_on_seed_and_position_only():
    u, _ = draw([7, 8, 7], [3, 3, 3])
    alone, _ = draw([7], [3])
    assert u[0] == u[2] == alone[0]
    assert u[1] != u[0]
