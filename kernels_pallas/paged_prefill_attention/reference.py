"""Paged prefill attention in plain JAX, for serving on a CPU.

For each chunk, block after block of its keys is gathered once and attended by every tile of its
queries that sees it; each query keeps a running softmax. The work grows with the visible (query,
key) pairs, in steps of a tile and a block.

A chunk's last tile reaches past its end. The queries there see no key, so they add nothing that
outlives the first real key of the chunk they belong to (`blocks.LOWEST`).
"""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.blocks import Softmax, logits_of, take

TILE: Final = 64
"""Query tokens that attend a block together; half of it in batches of at most that many."""

BLOCK: Final = 128
"""Keys in a block, rounded to whole pages; also half of it in small batches."""


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
    tile, block = (TILE, BLOCK) if T > TILE else (TILE // 2, BLOCK // 2)
    pages = max(1, block // page_size)
    block = pages * page_size

    def attend_chunk(r, state):
        first_token, end_token = cu_q_lens[r], cu_q_lens[r + 1]
        context_len = context_lens[r]
        start = context_len - (end_token - first_token)
        num_tiles = -(-(end_token - first_token) // tile)

        def attend_block(j, state):
            columns = j * pages + jnp.arange(pages, dtype=jnp.int32)
            page_ids = page_table[r, jnp.minimum(columns, page_table.shape[1] - 1)][None]
            k, v = jax.lax.optimization_barrier((take(k_pages, page_ids), take(v_pages, page_ids)))
            keys = j * block + jnp.arange(block, dtype=jnp.int32)

            def attend_tile(t, state):
                positions = start + t * tile + jnp.arange(tile, dtype=jnp.int32)
                distance = positions[:, None] - keys[None]
                visible = (distance >= 0) & (positions < context_len)[:, None]
                if window is not None:
                    visible &= distance < window
                visible = jnp.repeat(visible, G, axis=0, total_repeat_length=G * tile)[None]
                first_query = (first_token + t * tile) * G
                q_tile = jax.lax.dynamic_slice_in_dim(queries, first_query, G * tile, axis=2)
                part = state.slice(first_query, G * tile)
                part = part.add(logits_of(q_tile, k, visible, soft_cap), v)
                return state.update(first_query, part)

            first_tile = jnp.maximum(j * block - start, 0) // tile
            end_tile = num_tiles
            if window is not None:
                end_tile = jnp.minimum(
                    num_tiles, ((j + 1) * block - 2 + window - start) // tile + 1
                )
            return jax.lax.fori_loop(first_tile, end_tile, attend_tile, state)

        first_block = 0 if window is None else jnp.maximum(start - window + 1, 0) // block
        end_block = jnp.where(num_tiles > 0, -(-context_len // block), 0)
        return jax.lax.fori_loop(first_block, end_block, attend_block, state)

    # [1, K, (T + tile) * G, H]: the queries of a kv head side by side, one chunk after another.
    queries = (scale * q.astype(jnp.float32)).reshape(T, K, G, H)
    queries = jnp.pad(jnp.swapaxes(queries, 0, 1), ((0, 0), (0, tile), (0, 0), (0, 0)))
    queries = queries.reshape(1, K, (T + tile) * G, H)
    state = Softmax.empty(*queries.shape)
    state = jax.lax.fori_loop(0, page_table.shape[0], attend_chunk, state)
    out, lse = (
        jnp.swapaxes(x.reshape(K, T + tile, G, -1)[:, :T], 0, 1).reshape(T, N, -1)
        for x in state.finish()
    )
    is_token = (jnp.arange(T, dtype=jnp.int32) < cu_q_lens[-1])[:, None]
    out = jnp.where(is_token[..., None], out, 0.0)
    return out.astype(q.dtype), jnp.where(is_token, lse[..., 0], -jnp.inf)
