"""Paged prefill attention in plain JAX, for serving on a CPU.

For each chunk, block after block of its keys is gathered once and attended by every tile of its
queries that sees it; each query keeps a running softmax. The work grows with the visible (query,
key) pairs, in steps of a tile and a block. A chunk's last tile may reach into the next chunk or
into padding: the queries there see no key, and nothing is added to them.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

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

    # [1, K, (T + tile) * G, H]: the queries of a kv head side by side, one chunk after another.
    queries = (scale * q.astype(jnp.float32)).reshape(T, K, G, H)
    queries = jnp.pad(jnp.swapaxes(queries, 0, 1), ((0, 0), (0, tile), (0, 0), (0, 0)))
    queries = queries.reshape(1, K, (T + tile) * G, H)

    def attend_chunk(r, state):
        first_token, end_token = cu_q_lens[r], cu_q_lens[r + 1]
        start = context_lens[r] - (end_token - first_token)
        num_tiles = -(-(end_token - first_token) // tile)

        def attend_block(j, state):
            columns = j * pages + jnp.arange(pages, dtype=jnp.int32)
            page_ids = page_table[r, jnp.minimum(columns, page_table.shape[1] - 1)][None]
            k, v = jax.lax.optimization_barrier((take(k_pages, page_ids), take(v_pages, page_ids)))
            keys = j * block + jnp.arange(block, dtype=jnp.int32)

            def attend_tile(t, state):
                first_query = (first_token + t * tile) * G
                positions = start + t * tile + jnp.arange(tile, dtype=jnp.int32)
                visible = _visible(positions, keys, context_lens[r], window)
                visible = jnp.repeat(visible, G, axis=0, total_repeat_length=tile * G)[None]
                q_tile = jax.lax.dynamic_slice_in_dim(queries, first_query, tile * G, axis=2)
                logits = logits_of(q_tile, k, visible, soft_cap)
                return state.update(first_query, state.slice(first_query, tile * G).add(logits, v))

            first_tile = jnp.maximum(j * block - start, 0) // tile
            end_tile = num_tiles
            if window is not None:
                last_position = (j + 1) * block - 2 + window
                end_tile = jnp.minimum(end_tile, (last_position - start) // tile + 1)
            return jax.lax.fori_loop(first_tile, end_tile, attend_tile, state)

        first_block = 0 if window is None else jnp.maximum(start - window + 1, 0) // block
        end_block = jnp.where(num_tiles > 0, -(-context_lens[r] // block), 0)
        return jax.lax.fori_loop(first_block, end_block, attend_block, state)

    state = Softmax.empty(*queries.shape)
    state = jax.lax.fori_loop(0, page_table.shape[0], attend_chunk, state)
    out, lse = state.finish()
    out = jnp.swapaxes(out.reshape(K, -1, G, H)[:, :T], 0, 1).reshape(T, N, H)
    lse = jnp.swapaxes(lse.reshape(K, -1, G)[:, :T], 0, 1).reshape(T, N)
    return out.astype(q.dtype), lse


def _visible(
    positions: Int32[Array, " T"],
    keys: Int32[Array, " S"],
    context_len: Int32[Array, ""],
    window: int | None,
) -> Bool[Array, "T S"]:
    """Which keys each query sees; a query past the end of the context sees none."""
    distance = positions[:, None] - keys[None]
    visible = (distance >= 0) & (positions < context_len)[:, None]
    return visible if window is None else visible & (distance < window)
