"""Paged prefill attention for any GPU of Triton, in the form of vLLM's unified kernel.

A tile is a few query tokens with query heads of a kv head (arXiv 2511.11581). Keys are gathered
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

MAX_HEADS: Final = 16
"""Query heads of a kv head in a tile, a power of two; the others read the keys again."""

BLOCK: Final = 32
"""Keys of an iteration. With 64, registers spill at head_dim 128 on an A100 (compiled)."""


def tile_shape(head_dim: int, mean_rows: int) -> tuple[int, int]:
    """(rows of a tile, warps) for chunks of so many rows in the mean.

    ptxas rather spills a little than let one thread block less onto an SM: the registers that a
    thread needs have to lie below such a step, or well above. At head_dim 64 they do with four
    warps of 16 rows. From there on 64 of them are sums of the output, and about 200 are needed:
    with 8 warps the next steps are 128 and 255, with 4 one is at 168, where some shapes spill.
    """
    if mean_rows < 64:
        return 16, 4
    if head_dim <= 64:
        return 64, 4
    return 64 * 8 * 32 // pl.next_power_of_2(head_dim), 8


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
    G = N // k_pages.shape[1]
    allowed = "bfloat16 or float16"
    require_supported(q.dtype in (jnp.bfloat16, jnp.float16), "q.dtype", q.dtype.name, allowed)
    require_supported(H <= MAX_HEAD_DIM, "head_dim", H, f"at most {MAX_HEAD_DIM}")
    heads = math.gcd(G, MAX_HEADS)
    rows, num_warps = tile_shape(H, T * heads // len(context_lens))
    tiles = cut(
        cu_q_lens,
        context_lens,
        num_tokens=T,
        tile=rows // heads,
        align=1,
        block=BLOCK,
        window=window,
    )
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)]
    return triton_call(
        functools.partial(_body, rows, heads, BLOCK, scale, window, soft_cap),
        out_shape=out_shape,
        grid=(len(tiles.table), N // heads),
        num_warps=num_warps,
        num_stages=2,
        name="paged_prefill_attention",
    )(q, k_pages, v_pages, page_table, tiles.table)


def _body(
    rows: int,
    heads: int,
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
    number, head_tile = pl.program_id(0), pl.program_id(1)
    kv_head = lax.div(head_tile, q_ref.shape[1] // k_ref.shape[1] // heads)
    tokens = rows // heads  # both powers of two
    page_size, head_dim = k_ref.shape[2:]
    tile = Tile(*(tiles_ref[number, field] for field in range(len(Tile._fields))))

    @pl.when(tile.start_token < tile.end_token)
    def _():
        row = jnp.arange(rows, dtype=jnp.int32)
        token = lax.div(row, heads)
        head = head_tile * heads + lax.rem(row, heads)
        is_row = tile.first_token + token < tile.end_token
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
