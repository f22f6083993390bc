"""Shapes of prefill attention, as data: what tests check and benchmarks time."""

from dataclasses import dataclass, field
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import Heads, normal, page_table


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

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """(q, k_pages, v_pages, cu_q_lens, page_table, context_lens)."""
        rng = np.random.default_rng(seed)
        heads = self.heads
        max_pages = max(1, -(-max(self.context_lens) // heads.page_size))
        num_pages, table = page_table(rng, self.context_lens, heads.page_size, max_pages)
        num_tokens = sum(self.q_lens) + self.num_padding
        q = normal(rng, (num_tokens, heads.num_heads, heads.head_dim), heads.dtype)
        pages = [normal(rng, (num_pages, *heads.page_shape), heads.dtype) for _ in range(2)]
        cu_q_lens = jnp.asarray(np.cumsum([0, *self.q_lens]), jnp.int32)
        lens = jnp.asarray(self.context_lens, jnp.int32)
        return q, *pages, cu_q_lens, jnp.asarray(table), lens

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
)

CPU_BENCHMARKS: Final = (
    Case("512 tokens, MHA", Heads(12, 12, 64, 16), (512,), (0,)),
    Case("512 tokens, GQA", Heads(12, 4, 64, 16), (512,), (0,)),
    Case("512 tokens after 4096, MHA", Heads(12, 12, 64, 16), (512,), (4096,)),
    Case("512 tokens after 4096, GQA", Heads(12, 4, 64, 16), (512,), (4096,)),
    Case("16 chunks of 32, MHA", Heads(12, 12, 64, 16), (32,) * 16, (0,) * 16),
    Case("3 prompts, MHA", Heads(12, 12, 64, 16), (100, 156, 256), (0,) * 3),
)
