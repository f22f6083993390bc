"""Writing KV in plain JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def kv_write(
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slot_mapping: Int32[Array, " T"],
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """See `kernels_pallas.kv_write.kv_write`."""
    num_pages, _, page_size, _ = k_pages.shape
    page_ids = jnp.where(slot_mapping < 0, num_pages, slot_mapping // page_size)
    offsets = slot_mapping % page_size
    return (
        k_pages.at[page_ids, :, offsets].set(k, mode="drop"),
        v_pages.at[page_ids, :, offsets].set(v, mode="drop"),
    )
