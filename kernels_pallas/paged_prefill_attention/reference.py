"""Paged prefill attention in plain JAX: tiles of queries over blocks of keys, online softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

TILE = 64
"""Query tokens processed together."""


def paged_prefill_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    cu_q_lens: Int32[Array, " R1"],
    page_table: Int32[Array, "R M"],
    context_lens: Int32[Array, " R"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `kernels_pallas.paged_prefill_attention.paged_prefill_attention`."""
    T, N, H = q.shape
    K, page_size = k_pages.shape[1:3]
    G = N // K
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    tile_ends = jnp.cumsum(-(-q_lens // TILE))
    padded_q = jnp.pad(q, ((0, TILE), (0, 0), (0, 0)))

    def attend_tile(tile, results):
        row = jnp.searchsorted(tile_ends, tile, side="right").astype("int32")
        past_tiles = jnp.where(row == 0, 0, tile_ends[row - 1])
        first = cu_q_lens[row] + (tile - past_tiles) * TILE
        count = jnp.minimum(cu_q_lens[row + 1] - first, TILE)
        positions = context_lens[row] - cu_q_lens[row + 1] + first + jnp.arange(TILE)
        queries = jax.lax.dynamic_slice_in_dim(padded_q, first, TILE).reshape(TILE, K, G, H)
        valid = jnp.arange(TILE) < count

        def attend_page(j, carry):
            highest, total, acc = carry
            k, v = k_pages[page_table[row, j]], v_pages[page_table[row, j]]  # [K, page, H]
            logits = scale * jnp.einsum(
                "tkgh,ksh->kgts", queries, k, preferred_element_type="float32"
            )
            if soft_cap is not None:
                logits = soft_cap * jnp.tanh(logits / soft_cap)
            back = positions[:, None] - (j * page_size + jnp.arange(page_size))[None, :]
            visible = back >= 0 if window is None else (back >= 0) & (back < window)
            visible = (visible & valid[:, None])[None, None]
            logits = jnp.where(visible, logits, -jnp.inf)
            new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
            shift = jnp.where(jnp.isneginf(new_highest), 0.0, new_highest)
            weights = jnp.exp(logits - shift[..., None])
            keep = jnp.exp(highest - shift)
            update = jnp.einsum("kgts,ksh->kgth", weights, v.astype("float32"))
            return (
                new_highest,
                keep * total + jnp.sum(weights, axis=-1),
                keep[..., None] * acc + update,
            )

        rows = (K, G, TILE)
        start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, H)))
        num_pages = (positions[0] + count - 1) // page_size + 1
        highest, total, acc = jax.lax.fori_loop(0, num_pages, attend_page, start)
        shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
        out = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
        out = jnp.transpose(out.reshape(N, TILE, H), (1, 0, 2)).astype(q.dtype)
        lse = jnp.transpose((jnp.log(total) + shift).reshape(N, TILE))
        # A later tile rewrites what this one leaves past its chunk's end.
        return (
            jax.lax.dynamic_update_slice_in_dim(results[0], out, first, axis=0),
            jax.lax.dynamic_update_slice_in_dim(results[1], lse, first, axis=0),
        )

    results = (jnp.zeros((T + TILE, N, H), q.dtype), jnp.full((T + TILE, N), -jnp.inf))
    out, lse = jax.lax.fori_loop(0, tile_ends[-1], attend_tile, results)
    return out[:T], lse[:T]
