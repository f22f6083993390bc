"""Random inputs of the attention ops, for tests and benchmarks alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


@dataclass(frozen=True, slots=True)
class Heads:
    """What a model fixes: the shape of a page, and how many query heads read it."""

    num_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "float32"

    @property
    def page_shape(self) -> tuple[int, int, int]:
        return self.kv_heads, self.page_size, self.head_dim

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    def spec(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))


LLAMA_8B: Final = Heads(32, 8, 128, 64, "bfloat16")
"""Of Llama 3.1 8B, with the page size that GPUs use."""


def int32_spec(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> Float[Array, "..."]:
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def slots(
    rng: np.random.Generator, num_slots: int, num_tokens: int, num_dropped: int
) -> Int32[Array, " T"]:
    """Distinct slots of a pool in random order, for all but `num_dropped` of the tokens."""
    chosen = rng.permutation(num_slots)[:num_tokens]
    chosen[rng.permutation(num_tokens)[:num_dropped]] = -1
    return jnp.asarray(chosen, jnp.int32)


def page_table(
    rng: np.random.Generator, context_lens: Sequence[int], page_size: int, max_pages: int
) -> tuple[int, Int32[np.ndarray, "B M"]]:
    """(number of pages in the pool, table): distinct pages in random order, none of them page 0.

    Entries past the end of a context are 0, the scratch page.
    """
    counts = [-(-length // page_size) for length in context_lens]
    free = list(rng.permutation(np.arange(1, sum(counts) + 1, dtype=np.int32)))
    table = np.zeros((len(counts), max_pages), np.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = [free.pop() for _ in range(count)]
    return sum(counts) + 1, table
