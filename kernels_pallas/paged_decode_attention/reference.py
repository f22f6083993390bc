"""Paged decode attention in plain JAX, for serving on a CPU.

Contexts are cut into blocks of keys. The blocks of all rows, one after another, are dealt out in
equal runs to a few lanes, and each iteration attends one block of every lane: the work grows with
the sum of the contexts, whatever the longest one is and however many rows are padding. Each lane
keeps a running softmax and starts a new part at each new row. Rows and lanes both ascend, so
`row + lane` numbers the parts without a clash; in the end each row's parts are merged.
"""

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.blocks import Softmax, logits_of, take
from kernels_pallas.merge_attention.reference import merge_attention

BLOCK: Final = 64
"""Keys in a block, rounded to whole pages."""

MAX_LANES: Final = 8

MAX_BYTES: Final = 2**19
"""Of keys that an iteration reads: these and the values then fit a core's L2 cache."""


class Blocks(NamedTuple):
    """The blocks of all rows, one after another.

    Attributes:
      starts: index of each row's first block.
      ends: one past the index of its last block.
      first_key: first position that each row sees.
      first_block: the block of its context that holds it.
    """

    starts: Int32[Array, " B"]
    ends: Int32[Array, " B"]
    first_key: Int32[Array, " B"]
    first_block: Int32[Array, " B"]


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
    blocks = _cut(context_lens, window, block)
    num_lanes = max(1, min(MAX_LANES, MAX_BYTES // (4 * K * block * H)))
    lanes = jnp.arange(num_lanes, dtype=jnp.int32)
    run = -(-blocks.ends[-1] // num_lanes)
    queries = (scale * q.astype(jnp.float32)).reshape(B, K, N // K, H)

    def attend_blocks(i, carry):
        parts, part = carry
        index = jnp.minimum(lanes * run + i, blocks.ends[-1])
        row = jnp.searchsorted(blocks.ends, index, side="right", method="compare_all")
        row = jnp.minimum(row.astype(jnp.int32), B - 1)
        start = blocks.starts[row]
        j = (blocks.first_block[row] + index - start)[:, None]
        keys = j * block + jnp.arange(block, dtype=jnp.int32)[None]
        visible = (keys < context_lens[row][:, None]) & (keys >= blocks.first_key[row][:, None])
        columns = j * pages + jnp.arange(pages, dtype=jnp.int32)[None]
        page_ids = page_table[row[:, None], jnp.minimum(columns, page_table.shape[1] - 1)]
        lane_queries = jax.lax.optimization_barrier(queries[row])
        logits = logits_of(lane_queries, take(k_pages, page_ids), visible[:, None], soft_cap)
        part = part.restart(index == start).add(logits, take(v_pages, page_ids))
        return parts.put(row + lanes, part), part

    parts = Softmax.empty(B + num_lanes, K, N // K, H)
    part = Softmax.empty(num_lanes, K, N // K, H)
    parts, _ = jax.lax.fori_loop(0, run, attend_blocks, (parts, part))
    out, lse = _merge(parts, blocks, lanes[:, None] * run, run)
    return out.reshape(B, N, H).astype(q.dtype), lse.reshape(B, N)


def _cut(context_lens: Int32[Array, " B"], window: int | None, block: int) -> Blocks:
    first_key = jnp.zeros_like(context_lens)
    if window is not None:
        first_key = jnp.maximum(context_lens - window, 0)
    first_block = first_key // block
    num_blocks = -(-context_lens // block) - first_block
    ends = jnp.cumsum(num_blocks)
    return Blocks(ends - num_blocks, ends, first_key, first_block)


def _merge(
    parts: Softmax, blocks: Blocks, run_starts: Int32[Array, "lanes 1"], run: Int32[Array, ""]
) -> tuple[Float32[Array, "B K G H"], Float32[Array, "B K G"]]:
    """Each row's attention from its parts; lane l read the blocks `run_starts[l]` to + `run`."""
    first = jnp.maximum(blocks.starts[None], run_starts)
    end = jnp.minimum(blocks.ends[None], run_starts + run)
    outs, lses = parts.finish()
    num_lanes, num_rows = first.shape
    outs = jnp.stack([outs[lane : lane + num_rows] for lane in range(num_lanes)])
    lses = jnp.stack([lses[lane : lane + num_rows] for lane in range(num_lanes)])
    return merge_attention(outs, jnp.where((first < end)[..., None, None], lses, -jnp.inf))
