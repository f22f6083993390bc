"""Picking items of each row of a [B, V] array in two levels: first blocks, then items in them.

A block costs one vectorised reduction over the row; everything else works on [B, V / 256]. For
B = 32, V = 128256 on one CPU core that takes argmax from 11.5 ms to 0.8 ms and the 64 best from
4.8 ms to 2.2 ms, and spares sampling a cumulative sum over the vocabulary. On a GPU, where XLA
makes `lax.top_k` a full sort, it sorts 4096 items of a row instead of 128256.
"""

from typing import Final

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

_BLOCK_WIDTHS: Final = (256, 128, 64)
_TOP_BLOCK_WIDTH: Final = 64


def argmax(x: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    """Index of each row's largest value, the first of equal ones."""
    blocks = _blocks(x, padding=-jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=2), axis=1)
    return _index(blocks, block, jnp.argmax(_take(blocks, block), axis=1))


def categorical(
    weights: Float32[Array, "B V"], u: Float32[Array, " B"], v: Float32[Array, " B"]
) -> Int32[Array, " B"]:
    """Index i of each row with probability weights[i] / sum(weights); never one of weight 0.

    `u` picks the block and `v`, independent of it, the item, so that float32 resolves probabilities
    far below 2**-24.
    """
    blocks = _blocks(weights, padding=0.0)
    block = _invert_cdf(jnp.sum(blocks, axis=2), u)
    return _index(blocks, block, _invert_cdf(_take(blocks, block), v))


def top_k(x: Float32[Array, "B V"], k: int) -> tuple[Float32[Array, "B k"], Int32[Array, "B k"]]:
    """Each row's k largest values, best first, and their indices; of equal ones the first.

    The k blocks with the largest maxima hold them all: each of those blocks has an item before any
    item of another block. They stay in order, so that equal values do too.
    """
    if x.shape[1] <= 2 * k * _TOP_BLOCK_WIDTH:
        values, ids = lax.top_k(x, k)
        return values, ids
    blocks = _blocks(x, padding=-jnp.inf, widths=(_TOP_BLOCK_WIDTH,))
    _, chosen = lax.top_k(jnp.max(blocks, axis=2), k)
    chosen = jnp.sort(chosen, axis=1)
    items = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1, mode="clip")
    values, place = lax.top_k(items.reshape(x.shape[0], -1), k)
    block = jnp.take_along_axis(chosen, place // _TOP_BLOCK_WIDTH, axis=1, mode="clip")
    return values, block * _TOP_BLOCK_WIDTH + place % _TOP_BLOCK_WIDTH


def cumulative(x: Float32[Array, "B n"]) -> Float32[Array, "B n"]:
    """Cumulative sum along short rows, as a product with a triangle of ones.

    XLA takes ten times as long to compile `jnp.cumsum`, and every program has three of these.
    """
    triangle = np.triu(np.ones((x.shape[1], x.shape[1]), np.float32))
    return lax.dot(x, jnp.asarray(triangle), precision=lax.Precision.HIGHEST)


def _invert_cdf(mass: Float32[Array, "B n"], u: Float32[Array, " B"]) -> Int32[Array, " B"]:
    """The first index of positive mass where the cumulative sum exceeds u times the total.

    Rounding may put a step where there is no mass, or leave no such index: then it is the first one
    of positive mass.
    """
    summed = cumulative(mass)
    is_possible = mass > 0
    is_beyond = is_possible & (summed > (u * summed[:, -1])[:, None])
    return jnp.argmax(is_possible.astype(jnp.int32) + is_beyond.astype(jnp.int32), axis=1)


def _blocks(
    x: Float32[Array, "B V"], *, padding: float, widths: tuple[int, ...] = _BLOCK_WIDTHS
) -> Float32[Array, "B blocks width"]:
    """The row in blocks of the first of `widths` that divides it, padded if none does."""
    size = x.shape[1]
    width = next((w for w in widths if size % w == 0), widths[len(widths) // 2])
    x = jnp.pad(x, ((0, 0), (0, -size % width)), constant_values=padding)
    return x.reshape(x.shape[0], -1, width)


def _take(
    blocks: Float32[Array, "B blocks width"], block: Int32[Array, " B"]
) -> Float32[Array, "B width"]:
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1, mode="clip")[:, 0]


def _index(
    blocks: Float32[Array, "B blocks width"], block: Int32[Array, " B"], item: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    return block * blocks.shape[2] + item
