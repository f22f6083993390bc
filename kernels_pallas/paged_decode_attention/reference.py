"""Paged decode attention in plain JAX, for serving on a CPU.

Contexts are cut into blocks of keys. The blocks of all rows, one after another, are dealt out in
equal runs to a few lanes, and each iteration attends one block of every lane: the work grows with
the sum of the contexts, whatever the longest one is and however many rows are padding. Each lane
keeps a running softmax and starts a new part at each new row. Rows and lanes both ascend, so
`row + lane` numbers the parts without a clash; in the end each row's parts are merged.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.blocks import Softmax, logits_of, take
from kernels_pallas.merge_attention.reference import merge_attention

BLOCK: Final = 64
"""Keys in a block, rounded to whole pages."""

MAX_LANES: Final = 8

MAX_BYTES: Final = 3 * 2**18
"""Of keys that an iteration reads: these and the values then fit a core's L2 cache."""


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
    pages = max(1, BLOCK // page_size)
    block = pages * page_size
    lanes = jnp.arange(max(1, min(MAX_LANES, MAX_BYTES // (4 * K * block * H))), dtype=jnp.int32)
    num_lanes = lanes.size

    first_visible = jnp.zeros_like(context_lens)
    if window is not None:
        first_visible = jnp.maximum(context_lens - window, 0)
    first_block = first_visible // block
    ends = jnp.cumsum(-(-context_lens // block) - first_block)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    run = -(-ends[-1] // num_lanes)
    queries = (scale * q.astype(jnp.float32)).reshape(B, K, N // K, H)

    def attend_blocks(i, carry):
        parts, part = carry
        index = jnp.minimum(lanes * run + i, ends[-1])
        row = jnp.searchsorted(ends, index, side="right", method="compare_all")
        row = jnp.minimum(row.astype(jnp.int32), B - 1)
        is_new = (i == 0) | (index == starts[row])
        part = part.restart(is_new)

        blocks = first_block[row] + index - starts[row]
        keys = blocks[:, None] * block + jnp.arange(block, dtype=jnp.int32)[None]
        visible = (keys < context_lens[row][:, None]) & (keys >= first_visible[row][:, None])
        columns = blocks[:, None] * pages + jnp.arange(pages, dtype=jnp.int32)[None]
        page_ids = page_table[row[:, None], jnp.minimum(columns, page_table.shape[1] - 1)]
        lane_queries = jax.lax.optimization_barrier(queries[row])
        logits = logits_of(lane_queries, take(k_pages, page_ids), visible[:, None], soft_cap)
        part = part.add(logits, take(v_pages, page_ids))
        parts = parts.put(row + lanes, part)
        return parts, part

    parts = Softmax.empty(B + num_lanes, K, N // K, H)
    part = Softmax.empty(num_lanes, K, N // K, H)
    parts, _ = jax.lax.fori_loop(0, run, attend_blocks, (parts, part))
    outs, lses = parts.finish()
    run_starts = (lanes * run)[:, None]
    is_part = jnp.maximum(starts[None], run_starts) < jnp.minimum(ends[None], run_starts + run)
    lses = jnp.stack([lses[lane : lane + B] for lane in range(num_lanes)])
    lses = jnp.where(is_part[..., None, None], lses, -jnp.inf)
    outs = jnp.stack([outs[lane : lane + B] for lane in range(num_lanes)])
    out, lse = merge_attention(outs, lses)
    return out.reshape(B, N, H).astype(q.dtype), lse.reshape(B, N)
