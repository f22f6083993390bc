"""Shapes of KV writes, as data: what tests check and benchmarks time."""

from dataclasses import dataclass
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import Heads, normal


@dataclass(frozen=True, slots=True)
class Case:
    """One call: `num_tokens` new tokens, of which `num_dropped` have no slot."""

    name: str
    heads: Heads
    num_pages: int
    num_tokens: int
    num_dropped: int = 0

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """(k_pages, v_pages, k, v, slot_mapping)."""
        rng = np.random.default_rng(seed)
        heads = self.heads
        pages = [normal(rng, (self.num_pages, *heads.page_shape), heads.dtype) for _ in range(2)]
        new = (self.num_tokens, heads.kv_heads, heads.head_dim)
        k, v = (normal(rng, new, heads.dtype) for _ in range(2))
        slots = rng.permutation(self.num_pages * heads.page_size)[: self.num_tokens]
        slots[rng.permutation(self.num_tokens)[: self.num_dropped]] = -1
        return *pages, k, v, jnp.asarray(slots, jnp.int32)


TESTS: Final = (
    Case("float32", Heads(4, 2, 16, 8), 6, 20, num_dropped=5),
    Case("bfloat16", Heads(2, 1, 64, 16, "bfloat16"), 4, 7),
    Case("float16, page of one token", Heads(3, 3, 20, 1, "float16"), 9, 9),
    Case("all dropped", Heads(2, 2, 16, 8), 2, 3, num_dropped=3),
)

CPU_BENCHMARKS: Final = (
    Case("16 rows", Heads(12, 12, 64, 16), 2048, 16),
    Case("512 tokens", Heads(12, 12, 64, 16), 2048, 512),
)
