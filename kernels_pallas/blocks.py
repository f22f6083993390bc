"""Attention over blocks of paged keys in plain JAX, written for XLA:CPU.

A block is a few pages of one row. The functions take W blocks at once: keys and values are
[W, K, S, H], queries [W, K, G, H], where G queries share a kv head.
"""

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

LOWEST: Final = -1e30
"""Largest logit where no key was seen: finite, so that exp(-inf - LOWEST) is 0 and not NaN."""

LANES: Final = 32
"""Width of partial sums over H: LLVM unrolls a shorter loop and then fails to vectorise it."""

ROWS: Final = 8
"""Values added up in one pass: with more, XLA does not fuse the sum with the gather."""


class Softmax(NamedTuple):
    """Attention over the blocks seen so far (online softmax, arXiv 1805.02867).

    Attributes:
      highest: largest logit.
      total: Σ exp(logit - highest).
      acc: Σ exp(logit - highest) · value.
    """

    highest: Float32[Array, "W K G"]
    total: Float32[Array, "W K G"]
    acc: Float32[Array, "W K G H"]

    @staticmethod
    def empty(*shape: int) -> "Softmax":
        """Nothing seen yet; `shape` is (W, K, G, H)."""
        return Softmax(jnp.full(shape[:-1], LOWEST), jnp.zeros(shape[:-1]), jnp.zeros(shape))

    def add(self, logits: Float32[Array, "W K G S"], v: Float32[Array, "W K S H"]) -> "Softmax":
        """Also attends to one more block of keys with these logits and values."""
        highest = jnp.maximum(self.highest, jnp.max(logits, axis=-1))
        keep = jnp.exp(self.highest - highest)
        # Without the barrier XLA recomputes the exponentials for each of their uses.
        weights = jax.lax.optimization_barrier(jnp.exp(logits - highest[..., None]))
        total = keep * self.total + jnp.sum(weights, axis=-1)
        return Softmax(highest, total, keep[..., None] * self.acc + dot_values(weights, v))

    def restart(self, where: Bool[Array, " W"]) -> "Softmax":
        """Forgets what was seen, in the blocks that `where` tells."""
        where = where[:, None, None]
        return Softmax(
            jnp.where(where, LOWEST, self.highest),
            jnp.where(where, 0.0, self.total),
            jnp.where(where[..., None], 0.0, self.acc),
        )

    def put(self, indices: Int32[Array, " W"], other: "Softmax") -> "Softmax":
        """With the blocks of `other` as the blocks at `indices`, which ascend."""
        return Softmax(
            *(
                mine.at[indices].set(
                    theirs, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
                )
                for mine, theirs in zip(self, other, strict=True)
            )
        )

    def slice(self, first: Int32[Array, ""], num_queries: int) -> "Softmax":
        """Of `num_queries` queries from `first` on."""
        return Softmax(*(jax.lax.dynamic_slice_in_dim(x, first, num_queries, axis=2) for x in self))

    def update(self, first: Int32[Array, ""], other: "Softmax") -> "Softmax":
        """With `other` as the queries from `first` on."""
        return Softmax(
            *(
                jax.lax.dynamic_update_slice_in_dim(mine, theirs, first, axis=2)
                for mine, theirs in zip(self, other, strict=True)
            )
        )

    def finish(self) -> tuple[Float32[Array, "W K G H"], Float32[Array, "W K G"]]:
        """(out, lse) of everything that was added; (0, -inf) where no key was visible."""
        seen = self.total > 0.0
        total = jnp.where(seen, self.total, 1.0)
        lse = jnp.where(seen, jnp.log(total) + self.highest, -jnp.inf)
        return self.acc / total[..., None], lse


def take(
    pages: Float[Array, "P K page H"], page_ids: Int32[Array, "W n"]
) -> Float32[Array, "W K S H"]:
    """The tokens of W blocks, kv heads first, gathered (page, kv head) tile by tile."""
    num_pages, K, page_size, H = pages.shape
    tiles = pages.reshape(num_pages * K, page_size, H)
    heads = jnp.arange(K, dtype=jnp.int32)
    # Indices computed inside the gather's inner loop would keep it from being vectorised.
    indices = jax.lax.optimization_barrier(page_ids[:, None, :] * K + heads[None, :, None])
    tokens = tiles.at[indices.reshape(-1)].get(mode="promise_in_bounds")
    return tokens.reshape(len(page_ids), K, -1, H).astype(jnp.float32)


def logits_of(
    q: Float32[Array, "W K G H"],
    k: Float32[Array, "W K S H"],
    visible: Bool[Array, "W ... S"],
    soft_cap: float | None,
) -> Float32[Array, "W K G S"]:
    """Logits of scaled queries for all keys of their blocks, -inf where a key is not visible."""
    logits = dot_keys(q, k)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return jnp.where(visible[:, None], logits, -jnp.inf)


def dot_keys(
    q: Float32[Array, "W K G H"], k: Float32[Array, "W K S H"]
) -> Float32[Array, "W K G S"]:
    """q · k for all keys of each block."""
    G, H = q.shape[2:]
    if G > 1:
        return jnp.einsum("wkgh,wksh->wkgs", q, k)
    # With one query per key XLA fuses the products with the gather: the keys are never copied.
    width = _divisor(H, LANES)
    products = [q[..., i : i + width] * k[..., i : i + width] for i in range(0, H, width)]
    return jnp.sum(jax.lax.optimization_barrier(sum(products)), axis=-1)[:, :, None]


def dot_values(
    weights: Float32[Array, "W K G S"], v: Float32[Array, "W K S H"]
) -> Float32[Array, "W K G H"]:
    """Σ weight · value over the keys of each block."""
    W, K, G, S = weights.shape
    if G > 1:
        return jnp.einsum("wkgs,wksh->wkgh", weights, v)
    rows = _divisor(S, ROWS)
    weights = weights.reshape(W, K, -1, rows)
    v = v.reshape(W, K, -1, rows, v.shape[-1])
    sums = sum(weights[..., i, None] * v[..., i, :] for i in range(rows))
    return jnp.sum(jax.lax.optimization_barrier(sums), axis=2)[:, :, None]


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)
