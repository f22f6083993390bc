"""Shapes of merges, as data: what tests check and benchmarks time."""

from dataclasses import dataclass
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import normal


@dataclass(frozen=True, slots=True)
class Case:
    """One call; `shape` is (S, ..., N, H)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """(outs, lses); about a quarter of the parts are empty."""
        rng = np.random.default_rng(seed)
        lses = rng.normal(scale=20.0, size=self.shape[:-1]).astype(np.float32)
        lses[rng.random(lses.shape) < 0.25] = -np.inf
        return normal(rng, self.shape, self.dtype), jnp.asarray(lses)


TESTS: Final = (
    Case("two parts", (2, 7, 3, 16)),
    Case("one part", (1, 5, 2, 16)),
    Case("more row dimensions, bfloat16", (5, 2, 3, 4, 32), "bfloat16"),
)

CPU_BENCHMARKS: Final = (Case("8 parts of 16 rows", (8, 16, 12, 64)),)
