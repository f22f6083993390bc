"""How far a result is from the float32 reference."""

import functools
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas

MOST: Final = {"bfloat16": 1e-2, "float16": 2e-3}
"""Largest root mean square error that passes: a few roundings of the dtype."""

MOST_LSE: Final = 5e-3


@dataclass(frozen=True, slots=True)
class Error:
    """Root mean square and largest error, in units of the reference's root mean square."""

    rms: float
    max: float

    def passes(self, dtype: str) -> bool:
        return self.rms <= MOST[dtype] and self.max <= 20 * MOST[dtype]


def error_of(result: Any, reference: Any) -> Error:
    """NaN if the result has one."""
    result, reference = (np.asarray(x, np.float32).astype(np.float64) for x in (result, reference))
    unit = np.sqrt(np.mean(reference**2))
    difference = np.abs(result - reference) / unit
    return Error(float(np.sqrt(np.mean(difference**2))), float(np.max(difference)))


def lse_error(result: Any, reference: Any) -> float:
    """Largest difference; infinite if they differ in which rows see no key."""
    result, reference = np.asarray(result), np.asarray(reference)
    seen = np.isfinite(reference)
    if not np.array_equal(seen, np.isfinite(result)):
        return float("inf")
    return float(np.max(np.abs(result[seen] - reference[seen]), initial=0.0))


def reference_attention(op: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """(out, lse) of the reference on float32 inputs, without TF32."""
    call = functools.partial(getattr(kernels_pallas, op), implementation="reference", **options)
    wide = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in inputs]
    with jax.default_matmul_precision("highest"):
        return jax.jit(call)(*wide)
