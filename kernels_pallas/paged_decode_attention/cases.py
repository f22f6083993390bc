"""Shapes of decode attention, as data: what tests check and benchmarks time."""

from dataclasses import dataclass, field
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import Heads, normal, page_table


@dataclass(frozen=True, slots=True)
class Case:
    """One call. `options` are keyword arguments of the op."""

    name: str
    heads: Heads
    context_lens: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """(q, k_pages, v_pages, page_table, context_lens)."""
        rng = np.random.default_rng(seed)
        heads = self.heads
        max_pages = max(1, -(-max(self.context_lens) // heads.page_size))
        num_pages, table = page_table(rng, self.context_lens, heads.page_size, max_pages)
        q = normal(rng, (len(table), heads.num_heads, heads.head_dim), heads.dtype)
        pages = [normal(rng, (num_pages, *heads.page_shape), heads.dtype) for _ in range(2)]
        return q, *pages, jnp.asarray(table), jnp.asarray(self.context_lens, jnp.int32)

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that must be read."""
        heads = self.heads
        token = 2 * heads.kv_heads * heads.head_dim * jnp.dtype(heads.dtype).itemsize
        window = self.options.get("window", max(self.context_lens))
        return sum(min(length, window) for length in self.context_lens) * token


TESTS: Final = (
    Case("one head each", Heads(3, 3, 32, 16), (0, 1, 16, 17, 130, 65)),
    Case("grouped", Heads(6, 2, 16, 16), (5, 64, 0, 0, 63, 200)),
    Case("one kv head, bfloat16", Heads(4, 1, 64, 32, "bfloat16"), (1, 33, 700)),
    Case("head_dim 96, float16", Heads(2, 2, 96, 64, "float16"), (64, 129)),
    Case("head_dim 256, page 128", Heads(8, 4, 256, 128), (300, 7, 128)),
    Case("head_dim 20, page 5", Heads(2, 2, 20, 5), (7, 4, 61)),
    Case("page of one token", Heads(4, 2, 16, 1), (3, 70)),
    Case("window", Heads(3, 3, 16, 16), (0, 100, 39, 40, 41, 1000), {"window": 40}),
    Case("window of one", Heads(4, 2, 16, 8), (1, 65, 64), {"window": 1}),
    Case("soft cap and scale", Heads(4, 2, 16, 8), (9, 90), {"soft_cap": 2.0, "scale": 0.7}),
    Case("all padding", Heads(2, 1, 16, 8), (0, 0)),
)

_RNG = np.random.default_rng(0)
_EVEN = tuple(_RNG.integers(256, 385, 16).tolist())
_MIXED = tuple(np.exp(_RNG.uniform(np.log(16), np.log(4096), 32)).astype(int).tolist())

CPU_BENCHMARKS: Final = (
    Case("16 rows, MHA, page 16", Heads(12, 12, 64, 16), _EVEN),
    Case("16 rows, MHA, page 64", Heads(12, 12, 64, 64), _EVEN),
    Case("16 rows, GQA, page 16", Heads(12, 4, 64, 16), _EVEN),
    Case("16 rows, GQA, page 64", Heads(12, 4, 64, 64), _EVEN),
    Case("32 rows of 16 to 4096, MHA", Heads(12, 12, 64, 16), _MIXED),
    Case("32 rows of 16 to 4096, GQA", Heads(12, 4, 64, 16), _MIXED),
    Case("1 row of 8192, MHA", Heads(12, 12, 64, 16), (8192,)),
    Case("1 row of 8192, GQA", Heads(12, 4, 64, 16), (8192,)),
)
