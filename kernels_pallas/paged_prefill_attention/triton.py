"""Paged prefill attention for any GPU of Triton, in the form of vLLM's unified kernel.

A tile is a few query tokens with all query heads of a kv head (arXiv 2511.11581). Keys are gathered
token by token, so a page may have any size, and `head_dim` is padded to a power of two. On Hopper
this form is far behind wgmma with TMA: there it serves shapes that `mosaic_gpu` does not take.
"""

import functools
import math
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.checks import require_supported
from kernels_pallas.compat import pl, pltriton, triton_call
from kernels_pallas.paged_prefill_attention.tiles import Tile, cut

LOG2E: Final = math.log2(math.e)

LOWEST: Final = -1e30
"""Largest logit where no key was seen: finite, so that exp2(-inf - LOWEST) is 0 and not NaN."""

MAX_HEAD_DIM: Final = 256

BLOCK: Final = 32
"""Keys of an iteration. With 64, registers spill at head_dim 128 on an A100 (compiled)."""


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
    K = k_pages.shape[1]
    G = N // K
    allowed = "bfloat16 or float16"
    require_supported(q.dtype in (jnp.bfloat16, jnp.float16), "q.dtype", q.dtype.name, allowed)
    require_supported(H <= MAX_HEAD_DIM, "head_dim", H, f"at most {MAX_HEAD_DIM}")
    mean_rows = T * G // len(context_lens)  # of a chunk
    rows = max(64 if mean_rows >= 64 else 16, pl.next_power_of_2(G))
    tiles = cut(
        cu_q_lens,
        context_lens,
        num_tokens=T,
        tile=rows // G,
        align=1,
        block=BLOCK,
        window=window,
    )
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)]
    return triton_call(
        functools.partial(_body, rows, BLOCK, scale, window, soft_cap),
        out_shape=out_shape,
        grid=(len(tiles.table), K),
        num_warps=4 if H <= 128 else 8,
        num_stages=2,
        name="paged_prefill_attention",
    )(q, k_pages, v_pages, page_table, tiles.table)


def _body(
    rows: int,
    block: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    q_ref,
    k_ref,
    v_ref,
    page_table_ref,
    tiles_ref,
    out_ref,
    lse_ref,
):
    number, kv_head = pl.program_id(0), pl.program_id(1)
    group = q_ref.shape[1] // k_ref.shape[1]
    tokens = rows // group
    page_size, head_dim = k_ref.shape[2:]
    tile = Tile(*(tiles_ref[number, field] for field in range(len(Tile._fields))))

    @pl.when(tile.start_token < tile.end_token)
    def _():
        row = jnp.arange(rows, dtype=jnp.int32)
        token = lax.div(row, group)
        head = kv_head * group + lax.rem(row, group)
        is_row = (token < tokens) & (tile.first_token + token < tile.end_token)
        position = tile.position + token
        token = tile.first_token + token
        column = jnp.arange(max(16, pl.next_power_of_2(head_dim)), dtype=jnp.int32)
        is_column = column < head_dim
        q_index = (token[:, None], head[:, None], column[None])
        q_mask = is_row[:, None] & is_column[None]
        q = pltriton.load(q_ref.at[q_index], mask=q_mask, other=0.0)

        def attend_block(masked, j, state):
            acc, highest, total = state
            key = j * block + jnp.arange(block, dtype=jnp.int32)
            page = lax.min(lax.div(key, page_size), page_table_ref.shape[1] - 1)
            page_id = pltriton.load(page_table_ref.at[tile.row, page])
            index = (page_id[:, None], kv_head, lax.rem(key, page_size)[:, None], column[None])

            def load(pages_ref):
                return pltriton.load(pages_ref.at[index], mask=is_column[None], other=0.0)

            logits = pltriton.dot(q, load(k_ref), trans_b=True) * (scale * LOG2E)
            if soft_cap is not None:
                cap = soft_cap * LOG2E
                logits = cap * (1.0 - 2.0 / (jnp.exp2(logits * (2 / soft_cap)) + 1.0))
            if masked:
                distance = position[:, None] - key[None]
                visible = distance >= 0
                if window is not None:
                    visible &= distance < window
                logits = jnp.where(visible, logits, -jnp.inf)
            new_highest = jnp.maximum(highest, logits.max(axis=1))
            keep = jnp.exp2(highest - new_highest)
            weights = jnp.exp2(logits - new_highest[:, None])
            total = total * keep + weights.sum(axis=1)
            acc = acc * keep[:, None] + pltriton.dot(weights.astype(q.dtype), load(v_ref))
            return acc, new_highest, total

        state = (
            jnp.zeros(q.shape, jnp.float32),
            jnp.full(rows, LOWEST, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        first, end = tile.first_block, tile.end_block
        if window is not None:
            edge = lax.div(lax.max(tile.position + tokens - window, 0) + (block - 1), block)
            edge = lax.clamp(first, edge, end)
            state = lax.fori_loop(first, edge, functools.partial(attend_block, True), state)
            first = edge
        diagonal = lax.clamp(first, lax.div(lax.max(tile.position + 1, 0), block), end)
        state = lax.fori_loop(first, diagonal, functools.partial(attend_block, False), state)
        acc, highest, total = lax.fori_loop(
            diagonal, end, functools.partial(attend_block, True), state
        )
        seen = total > 0.0
        out = acc * jnp.where(seen, 1.0 / total, 0.0)[:, None]
        lse = jnp.where(seen, (highest + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
        pltriton.store(out_ref.at[q_index], out.astype(q.dtype), mask=q_mask)
        pltriton.store(lse_ref.at[token, head], lse, mask=is_row)
