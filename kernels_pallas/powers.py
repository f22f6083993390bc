"""Softmax in powers of 2, for which GPUs have an instruction."""

import math
from typing import Any, Final

import jax.numpy as jnp

LOG2E: Final = math.log2(math.e)


def logits(products: Any, scale: float, soft_cap: float | None) -> Any:
    """Logits in powers of 2 (times log2(e)) from float32 q · k, of any shape and layout."""
    if soft_cap is None:
        return products * (scale * LOG2E)
    # soft_cap * tanh(x), where tanh(x) = 1 - 2 / (exp(2 x) + 1)
    exponential = jnp.exp2(products * (2 * LOG2E * scale / soft_cap))
    return soft_cap * LOG2E - (2 * soft_cap * LOG2E) / (exponential + 1)
