"""Paged decode attention in plain JAX: one pass over blocks of keys with an online softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def paged_decode_attention(
    q: Float[Array, "B N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
    context_lens: Int32[Array, " B"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """See `kernels_pallas.paged_decode_attention.paged_decode_attention`."""
    B, N, H = q.shape
    K, page_size = k_pages.shape[1:3]
    queries = q.reshape(B, K, N // K, H)

    def attend_page(j, carry):
        highest, total, acc = carry
        page_ids = jax.lax.dynamic_index_in_dim(page_table, j, axis=1, keepdims=False)
        k, v = k_pages[page_ids], v_pages[page_ids]  # [B, K, page, H]
        logits = scale * jnp.einsum("bkgh,bksh->bkgs", queries, k, preferred_element_type="float32")
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        from_end = context_lens[:, None] - (j * page_size + jnp.arange(page_size))[None, :]
        visible = from_end > 0 if window is None else (from_end > 0) & (from_end <= window)
        visible = visible[:, None, None, :]
        logits = jnp.where(visible, logits, -jnp.inf)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
        shift = jnp.where(jnp.isneginf(new_highest), 0.0, new_highest)
        weights = jnp.exp(logits - shift[..., None])
        keep = jnp.exp(highest - shift)
        update = jnp.einsum("bkgs,bksh->bkgh", weights, v.astype("float32"))
        return (
            new_highest,
            keep * total + jnp.sum(weights, axis=-1),
            keep[..., None] * acc + update,
        )

    rows = (B, K, N // K)
    start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, H)))
    num_pages = -(-jnp.max(context_lens, initial=0) // page_size)
    highest, total, acc = jax.lax.fori_loop(0, num_pages, attend_page, start)
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    out = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
    return out.reshape(q.shape).astype(q.dtype), (jnp.log(total) + shift).reshape(B, N)
