"""Shapes of KV writes, as data: what tests check and benchmarks time."""

from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np

from kernels_pallas.cases import LLAMA_8B, Heads, int32_spec, normal, slots


@dataclass(frozen=True, slots=True)
class Case:
    """One call: `num_tokens` new tokens, of which `num_dropped` have no slot."""

    name: str
    heads: Heads
    num_pages: int
    num_tokens: int
    num_dropped: int = 0

    @property
    def num_bytes(self) -> int:
        """That must move: new keys and values are read and written."""
        return 2 * (self.num_tokens - self.num_dropped) * self.heads.token_bytes

    @property
    def specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of `inputs`."""
        heads = self.heads
        pages = heads.spec(self.num_pages, *heads.page_shape)
        new = heads.spec(self.num_tokens, heads.kv_heads, heads.head_dim)
        return pages, pages, new, new, int32_spec(self.num_tokens)

    def rows(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """(slot_mapping,)."""
        num_slots = self.num_pages * self.heads.page_size
        return (slots(rng, num_slots, self.num_tokens, self.num_dropped),)

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """(k_pages, v_pages, k, v, slot_mapping)."""
        rng = np.random.default_rng(seed)
        rows = self.rows(rng)
        return *(normal(rng, s.shape, s.dtype.name) for s in self.specs[:4]), *rows


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

GPU_BENCHMARKS: Final = (
    Case("64 rows", LLAMA_8B, 4096, 64),
    Case("2k tokens", LLAMA_8B, 4096, 2048),
    Case("8k tokens", LLAMA_8B, 4096, 8192),
)
