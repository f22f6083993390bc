"""Shapes of decode attention, as data: what tests check and benchmarks time."""

from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import LLAMA_8B, Heads, int32_spec, normal, page_table


@dataclass(frozen=True, slots=True)
class Case:
    """One call. `options` are keyword arguments of the op."""

    name: str
    heads: Heads
    context_lens: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of `inputs`."""
        heads = self.heads
        counts = [-(-length // heads.page_size) for length in self.context_lens]
        rows = len(counts)
        pages = heads.spec(1 + sum(counts), *heads.page_shape)
        q = heads.spec(rows, heads.num_heads, heads.head_dim)
        return q, pages, pages, int32_spec(rows, max(1, *counts)), int32_spec(rows)

    def rows(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """(page_table, context_lens)."""
        max_pages = self.specs[3].shape[1]
        _, table = page_table(rng, self.context_lens, self.heads.page_size, max_pages)
        return jnp.asarray(table), jnp.asarray(self.context_lens, jnp.int32)

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """(q, k_pages, v_pages, page_table, context_lens)."""
        rng = np.random.default_rng(seed)
        rows = self.rows(rng)
        return *(normal(rng, s.shape, s.dtype.name) for s in self.specs[:3]), *rows

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that must be read."""
        window = self.options.get("window", max(self.context_lens))
        return sum(min(length, window) for length in self.context_lens) * self.heads.token_bytes


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
    Case("group of 65", Heads(65, 1, 16, 8), (9, 0)),
    Case("all padding", Heads(2, 1, 16, 8), (0, 0)),
    Case("smallest pool", Heads(1, 1, 96, 16, "float16"), (1,)),
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

GPU_BENCHMARKS: Final = (
    Case("64 rows of 2k", LLAMA_8B, (2048,) * 64),
    Case("256 rows of 512", LLAMA_8B, (512,) * 256),
    Case("16 rows of 8k", LLAMA_8B, (8192,) * 16),
    Case("8 rows of 16k", LLAMA_8B, (16384,) * 8),
    Case("1 row of 4k", LLAMA_8B, (4096,)),
    Case("1 row of 32k", LLAMA_8B, (32768,)),
    Case("32 rows of 16 to 4k", LLAMA_8B, _MIXED),
    Case("64 rows of 2k, page 16", Heads(32, 8, 128, 16, "bfloat16"), (2048,) * 64),
    Case("64 rows of 2k, page 128", Heads(32, 8, 128, 128, "bfloat16"), (2048,) * 64),
    Case("64 rows of 2k, window 512", LLAMA_8B, (2048,) * 64, {"window": 512}),
    Case("64 rows of 2k, soft cap", LLAMA_8B, (2048,) * 64, {"soft_cap": 50.0}),
    Case("64 rows of 2k, 1 kv head", Heads(8, 1, 128, 64, "bfloat16"), (2048,) * 64),
    Case("32 rows of 2k, MHA", Heads(32, 32, 128, 64, "float16"), (2048,) * 32),
    Case("64 rows of 2k, head_dim 64", Heads(32, 8, 64, 64, "bfloat16"), (2048,) * 64),
    Case("32 rows of 2k, head_dim 96", Heads(32, 32, 96, 64, "bfloat16"), (2048,) * 32),
    Case("64 rows of 2k, head_dim 256", Heads(16, 8, 256, 64, "bfloat16"), (2048,) * 64),
)
