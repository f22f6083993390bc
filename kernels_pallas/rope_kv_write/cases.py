"""Shapes of rope_kv_write, as data: what tests check and benchmarks time."""

from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
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
    has_norms: bool = False

    @property
    def num_bytes(self) -> int:
        """That must move: all heads are read and written, those without a slot are not."""
        heads = self.heads
        queries = self.num_tokens * heads.num_heads * heads.head_dim
        kept = self.num_tokens - self.num_dropped
        return 2 * (queries * jnp.dtype(heads.dtype).itemsize + kept * heads.token_bytes)

    @property
    def specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of `inputs`."""
        heads, T = self.heads, self.num_tokens
        pages = heads.spec(self.num_pages, *heads.page_shape)
        qkv = heads.spec(T, heads.num_heads + 2 * heads.kv_heads, heads.head_dim)
        angles = jax.ShapeDtypeStruct((T, heads.head_dim // 2), jnp.float32)
        norms = (heads.spec(heads.head_dim),) * 2 if self.has_norms else ()
        return qkv, angles, angles, pages, pages, int32_spec(T), *norms

    def rows(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """(slot_mapping,)."""
        num_slots = self.num_pages * self.heads.page_size
        return (slots(rng, num_slots, self.num_tokens, self.num_dropped),)

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """(qkv, cos, sin, k_pages, v_pages, slot_mapping), and (q_norm, k_norm) if it has them."""
        rng = np.random.default_rng(seed)
        (slot_mapping,) = self.rows(rng)
        qkv, angle, *_ = self.specs
        angles = rng.uniform(0, 2 * np.pi, angle.shape).astype(np.float32)
        pools, norms = (
            [normal(rng, s.shape, s.dtype.name) for s in specs]
            for specs in (self.specs[3:5], self.specs[6:])
        )
        qkv = normal(rng, qkv.shape, qkv.dtype.name)
        return qkv, jnp.cos(angles), jnp.sin(angles), *pools, slot_mapping, *norms


TESTS: Final = (
    Case("float32", Heads(4, 2, 16, 8), 6, 20, num_dropped=5),
    Case("bfloat16, norms", Heads(4, 1, 64, 16, "bfloat16"), 4, 7, has_norms=True),
    Case("float16, 3 heads, page of one token", Heads(6, 3, 20, 1, "float16"), 9, 9),
    Case("float32, head_dim 96, norms", Heads(2, 2, 96, 16), 3, 5, 1, has_norms=True),
    Case("all dropped", Heads(2, 2, 16, 8), 2, 3, num_dropped=3),
)

GPU_BENCHMARKS: Final = (
    Case("64 rows", LLAMA_8B, 1024, 64),
    Case("64 rows, norms", LLAMA_8B, 1024, 64, has_norms=True),
    Case("2k tokens", LLAMA_8B, 1024, 2048),
)
