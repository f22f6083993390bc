"""Merging in plain JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def merge_attention(
    outs: Float[Array, "S *rows N H"], lses: Float32[Array, "S *rows N"]
) -> tuple[Float[Array, "*rows N H"], Float32[Array, "*rows N"]]:
    """See `kernels_pallas.merge_attention.merge_attention`."""
    highest = jnp.max(lses, axis=0)
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = jnp.exp(lses - shift[None])
    total = jnp.sum(weights, axis=0)
    weighted = jnp.sum(outs.astype(jnp.float32) * weights[..., None], axis=0)
    out = weighted / jnp.where(total == 0.0, 1.0, total)[..., None]
    return out.astype(outs.dtype), jnp.log(total) + shift
