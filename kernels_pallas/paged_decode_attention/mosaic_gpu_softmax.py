"""Online softmax in the registers of a warpgroup: keys or head_dim in rows, queries in columns."""

from typing import Any, Final, NamedTuple

import jax.numpy as jnp
from jax import lax

from kernels_pallas.compat import plgpu

LAYOUT: Final = plgpu.Layout.WGMMA
COLUMNS: Final = plgpu.Layout.WGMMA.reduce(0)


class Softmax(NamedTuple):
    """Attention to the keys seen so far (arXiv 1805.02867), in powers of 2, float32.

    Attributes:
      highest: [columns], largest logit.
      total: [keys, columns], sums to Σ 2 ** (logit - highest) over its rows.
      acc: [width, columns], Σ 2 ** (logit - highest) · value.
    """

    highest: Any
    total: Any
    acc: Any

    @staticmethod
    def empty(keys: int, width: int, columns: int) -> "Softmax":
        return Softmax(
            plgpu.layout_cast(jnp.full((columns,), -jnp.inf, jnp.float32), COLUMNS),
            plgpu.layout_cast(jnp.zeros((keys, columns), jnp.float32), LAYOUT),
            plgpu.layout_cast(jnp.zeros((width, columns), jnp.float32), LAYOUT),
        )

    def add(self, logits: Any) -> tuple["Softmax", Any]:
        """With `acc` and `total` rescaled for these logits, and the weights of their values.

        Every column of `logits` has a finite one.
        """
        highest = jnp.maximum(self.highest, logits.max(axis=0))
        keep = jnp.exp2(self.highest - highest)
        weights = jnp.exp2(logits - in_columns(highest, logits.shape))
        total = self.total * in_columns(keep, self.total.shape) + weights
        return Softmax(highest, total, self.acc * in_columns(keep, self.acc.shape)), weights

    def finish(self) -> tuple[Any, Any]:
        """(output [width, columns], base-2 log-sum-exp [columns])."""
        total = self.total.sum(axis=0)
        return self.acc * in_columns(1.0 / total, self.acc.shape), self.highest + jnp.log2(total)


def in_columns(x: Any, shape: tuple[int, ...]) -> Any:
    """x [columns], repeated for every row."""
    return lax.broadcast_in_dim(x, shape, [1])
