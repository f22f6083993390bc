"""Who reads which keys: equal runs of blocks for every thread block, whatever the contexts.

The contexts are cut into blocks of keys. A *segment* is the blocks of one row and one head, and a
*position* numbers the blocks of all segments, rows first. Thread block `c` reads the positions
`c * run` to `(c + 1) * run`, so none reads more than one block above the mean (the stream-K
decomposition, arXiv 2301.03598). Positions, segments and thread blocks all ascend: `segment +
thread block` numbers the parts without a clash, in rows * heads + num_ctas places.

A few integer operations of fixed shape inside the caller's program: nothing runs on the host, and
XLA computes a plan that all layers share once.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


class Plan(NamedTuple):
    """
    Attributes:
      rows: of each row: first position, blocks per head, first block that it sees, next row that
        is not empty, length.
      ctas: of each thread block: row of its first position, first position, end position.
      parts: of each segment: first part, number of parts.
    """

    rows: Int32[Array, "B 5"]
    ctas: Int32[Array, "C 3"]
    parts: Int32[Array, "B heads 2"]


class Segment(NamedTuple):
    """What a thread block reads of one row and head; int32 scalars.

    Attributes:
      length: of the row's context.
    """

    row: Any
    head: Any
    length: Any
    first_block: Any
    num_blocks: Any


def make_plan(
    context_lens: Int32[Array, " B"],
    window: int | None,
    *,
    block: int,
    num_heads: int,
    num_ctas: int,
) -> Plan:
    """The plan for `num_ctas` thread blocks that read blocks of `block` keys."""
    B = context_lens.shape[0]
    first_block = jnp.zeros_like(context_lens)
    if window is not None:
        first_block = jnp.maximum(context_lens - window, 0) // block
    num_blocks = -(-context_lens // block) - first_block
    ends = jnp.cumsum(num_blocks * num_heads)
    starts = ends - num_blocks * num_heads
    run = jnp.maximum(-(-ends[-1] // num_ctas), 1)

    row = jnp.arange(B, dtype=jnp.int32)
    later = (row[None, :] > row[:, None]) & (num_blocks > 0)[None, :]
    next_row = jnp.min(jnp.where(later, row[None, :], B - 1), axis=1)
    rows = jnp.stack([starts, num_blocks, first_block, next_row, context_lens], axis=1)

    first = jnp.arange(num_ctas, dtype=jnp.int32) * run
    first_row = jnp.sum(ends[None, :] <= first[:, None], axis=1, dtype=jnp.int32)
    last = jnp.minimum(first + run, ends[-1])
    ctas = jnp.stack([jnp.minimum(first_row, B - 1), first, last], axis=1)

    head = jnp.arange(num_heads, dtype=jnp.int32)[None, :]
    start = starts[:, None] + head * num_blocks[:, None]
    first_cta = start // run
    num_parts = (start + num_blocks[:, None] - 1) // run - first_cta + 1
    num_parts = jnp.where(num_blocks[:, None] > 0, num_parts, 0)
    parts = jnp.stack([row[:, None] * num_heads + head + first_cta, num_parts], axis=2)
    return Plan(rows, ctas, parts)


def segment_at(
    position: Any, row: Any, end: Any, *, rows_ref: Any, num_heads: int
) -> tuple[Segment, Any]:
    """In a kernel: the segment from `position` on, which is in `row`, and the row after it.

    Args:
      end: position where the thread block ends.
      rows_ref: `Plan.rows`.
    """
    start, num_blocks, first_block, next_row, length = (rows_ref[row, i] for i in range(5))
    head, block = lax.div(position - start, num_blocks), lax.rem(position - start, num_blocks)
    count = lax.min(num_blocks - block, end - position)
    is_last = position + count == start + num_heads * num_blocks
    segment = Segment(row, head, length, first_block + block, count)
    return segment, jnp.where(is_last, next_row, row)
