"""Shapes of prefill attention, as data: what tests check and benchmarks time."""

from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import LLAMA_8B, Heads, int32_spec, normal, page_table


@dataclass(frozen=True, slots=True)
class Case:
    """One call. `options` are keyword arguments of the op.

    Attributes:
      q_lens: tokens of each chunk.
      histories: tokens of each chunk's context before the chunk.
      num_padding: tokens after the last chunk.
    """

    name: str
    heads: Heads
    q_lens: tuple[int, ...]
    histories: tuple[int, ...]
    num_padding: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def context_lens(self) -> tuple[int, ...]:
        return tuple(q + h for q, h in zip(self.q_lens, self.histories, strict=True))

    @property
    def specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of `inputs`."""
        heads = self.heads
        counts = [-(-length // heads.page_size) for length in self.context_lens]
        rows = len(counts)
        pages = heads.spec(1 + sum(counts), *heads.page_shape)
        q = heads.spec(sum(self.q_lens) + self.num_padding, heads.num_heads, heads.head_dim)
        table = int32_spec(rows, max(1, *counts))
        return q, pages, pages, int32_spec(rows + 1), table, int32_spec(rows)

    def rows(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """(cu_q_lens, page_table, context_lens)."""
        max_pages = self.specs[4].shape[1]
        _, table = page_table(rng, self.context_lens, self.heads.page_size, max_pages)
        cu_q_lens = jnp.asarray(np.cumsum([0, *self.q_lens]), jnp.int32)
        return cu_q_lens, jnp.asarray(table), jnp.asarray(self.context_lens, jnp.int32)

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """(q, k_pages, v_pages, cu_q_lens, page_table, context_lens)."""
        rng = np.random.default_rng(seed)
        rows = self.rows(rng)
        return *(normal(rng, s.shape, s.dtype.name) for s in self.specs[:3]), *rows

    @property
    def num_flops(self) -> int:
        """Multiplications and additions for the visible (query, key) pairs."""
        pairs = sum(
            int(np.minimum(np.arange(h + 1, h + q + 1), self.options.get("window", h + q)).sum())
            for q, h in zip(self.q_lens, self.histories, strict=True)
        )
        return 4 * self.heads.num_heads * self.heads.head_dim * pairs


TESTS: Final = (
    Case("one head each", Heads(3, 3, 32, 16), (0, 1, 70, 16), (0, 0, 0, 40), num_padding=9),
    Case("grouped, small batch", Heads(6, 2, 16, 8), (17, 0, 33), (0, 12, 130), num_padding=3),
    Case("one kv head, bfloat16", Heads(4, 1, 64, 32, "bfloat16"), (40, 65), (33, 0)),
    Case("head_dim 96, float16", Heads(2, 2, 96, 64, "float16"), (80,), (0,)),
    Case("page of one token", Heads(4, 2, 16, 1), (3, 7), (2, 0), num_padding=1),
    Case("page 128", Heads(4, 2, 128, 128), (129,), (128,)),
    Case("window", Heads(3, 3, 16, 16), (200, 50), (300, 0), 6, {"window": 40}),
    Case("window of one", Heads(4, 2, 16, 8), (20, 30), (70, 0), 0, {"window": 1}),
    Case("soft cap and scale", Heads(4, 2, 16, 8), (30,), (9,), 2, {"soft_cap": 2.0, "scale": 0.7}),
    Case("no chunk at all", Heads(2, 1, 16, 8), (0, 0), (0, 20), num_padding=4),
    Case("smallest pool", Heads(1, 1, 96, 16, "float16"), (1,), (0,)),
    Case("group of 8, float16", Heads(8, 1, 128, 32, "float16"), (19, 1, 6), (410, 63, 0)),
    Case("group of 65", Heads(65, 1, 16, 8), (5, 1), (9, 0), num_padding=1),
    Case("group of 3, head_dim 256", Heads(3, 1, 256, 16, "bfloat16"), (13,), (200,), 7),
    Case(
        "window and soft cap, float16",
        Heads(4, 2, 64, 16, "float16"),
        (70, 10),
        (650, 5),
        options={"window": 90, "soft_cap": 3.0},
    ),
)

CPU_BENCHMARKS: Final = (
    Case("512 tokens, MHA", Heads(12, 12, 64, 16), (512,), (0,)),
    Case("512 tokens, GQA", Heads(12, 4, 64, 16), (512,), (0,)),
    Case("512 tokens after 4096, MHA", Heads(12, 12, 64, 16), (512,), (4096,)),
    Case("512 tokens after 4096, GQA", Heads(12, 4, 64, 16), (512,), (4096,)),
    Case("16 chunks of 32, MHA", Heads(12, 12, 64, 16), (32,) * 16, (0,) * 16),
    Case("3 prompts, MHA", Heads(12, 12, 64, 16), (100, 156, 256), (0,) * 3),
)

GPU_BENCHMARKS: Final = (
    Case("8k tokens", LLAMA_8B, (8192,), (0,)),
    Case("2k tokens after 8k", LLAMA_8B, (2048,), (8192,)),
    Case("512 tokens after 16k", LLAMA_8B, (512,), (16384,)),
    Case("16 chunks of 512", LLAMA_8B, (512,) * 16, (0,) * 16),
    Case("chunks of 1 to 4k", LLAMA_8B, (1, 17, 300, 1000, 2000, 4096), (900, 0, 60, 0, 5000, 0)),
    Case("8k tokens, page 16", Heads(32, 8, 128, 16, "bfloat16"), (8192,), (0,)),
    Case("8k tokens, page 128", Heads(32, 8, 128, 128, "bfloat16"), (8192,), (0,)),
    Case("8k tokens, window 1k", LLAMA_8B, (8192,), (0,), options={"window": 1024}),
    Case("8k tokens, soft cap", LLAMA_8B, (8192,), (0,), options={"soft_cap": 50.0}),
    Case("8k tokens, MHA", Heads(16, 16, 128, 64, "float16"), (8192,), (0,)),
    Case("8k tokens, head_dim 64", Heads(32, 8, 64, 64, "bfloat16"), (8192,), (0,)),
    Case("8k tokens, head_dim 96", Heads(32, 32, 96, 64, "bfloat16"), (8192,), (0,)),
    Case("8k tokens, head_dim 256", Heads(16, 8, 256, 64, "bfloat16"), (8192,), (0,)),
)
