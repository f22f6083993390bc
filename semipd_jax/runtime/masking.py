"""Token masks: what may not be sampled gets probability 0."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from semipd_jax.runtime.batch import Masks


def apply(
    logits: Float32[Array, "B V"], mask_ids: Int32[Array, " B"], masks: Masks
) -> Float32[Array, "B V"]:
    """-inf where the row has a mask (see `batch.Sampling`) whose bit of the token is 0."""
    words = jnp.concatenate(masks)[jnp.maximum(mask_ids - 1, 0)]
    bits = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    is_allowed = (bits & 1).reshape(logits.shape[0], -1)[:, : logits.shape[1]] != 0
    return jnp.where(is_allowed | (mask_ids == 0)[:, None], logits, -jnp.inf)
