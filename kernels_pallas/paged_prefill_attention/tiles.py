"""Cuts a ragged batch of chunks into tiles of query tokens, in jnp, with static shapes.

A tile is of one chunk: what it covers of other chunks belongs to them. Tokens after the last
chunk form tiles too, which see no key: kernels write their zeros.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32


class Tile(NamedTuple):
    """What a kernel knows of a tile, each an int32 scalar; of W tiles, each [W].

    Attributes:
      row: row of the page table.
      first_token: index into q of the tile's first query.
      position: place of the first query in the context of the chunk; negative before its start.
      start_token, end_token: where the chunk starts and ends in q; alike if the tile is unused.
      first_block, end_block: range of blocks of keys of which some query may see one.
    """

    row: Int32[Array, "..."]
    first_token: Int32[Array, "..."]
    position: Int32[Array, "..."]
    start_token: Int32[Array, "..."]
    end_token: Int32[Array, "..."]
    first_block: Int32[Array, "..."]
    end_block: Int32[Array, "..."]


class Tiles(NamedTuple):
    """All tiles of a batch, those with the most blocks of keys first.

    Attributes:
      table: a `Tile` in each row, unused ones last.
      of_token: the tile of each token of q.
      offset: place of each token of q in its tile.
    """

    table: Int32[Array, "W 7"]
    of_token: Int32[Array, " T"]
    offset: Int32[Array, " T"]


def cut(
    cu_q_lens: Int32[Array, " R1"],
    context_lens: Int32[Array, " R"],
    *,
    num_tokens: int,
    tile: int,
    align: int,
    block: int,
    window: int | None,
) -> Tiles:
    """Cuts `num_tokens` tokens into tiles of `tile` queries that see blocks of `block` keys.

    The first token of a tile is a multiple of `align`. See the op for the other arguments. Layers
    of one step cut alike, and XLA does it once.
    """
    R = len(context_lens)
    starts, ends = cu_q_lens, jnp.append(cu_q_lens[1:], num_tokens)
    context_lens = jnp.append(context_lens, 0)
    first_tokens = starts - starts % align
    counts = jnp.where(ends > starts, -((first_tokens - ends) // tile), 0)
    end_ids = jnp.cumsum(counts, dtype=jnp.int32)
    first_ids = end_ids - counts

    # Tokens to cover, and a quotient rounded up for each chunk and the padding.
    W = min(num_tokens, (num_tokens + (align - 1) * (R + 1)) // tile + R + 1)
    ids = jnp.arange(W, dtype=jnp.int32)
    rows = jnp.minimum(_interval(end_ids, ids), R)
    tile_tokens = first_tokens[rows] + (ids - first_ids[rows]) * tile
    positions = context_lens[rows] - ends[rows] + tile_tokens
    is_used = ids < end_ids[-1]
    end_keys = jnp.where(is_used, jnp.minimum(positions + tile, context_lens[rows]), 0)
    end_blocks = jnp.maximum(-(-end_keys // block), 0)
    first_keys = jnp.zeros_like(ids) if window is None else jnp.maximum(positions - window + 1, 0)
    first_blocks = jnp.minimum(first_keys // block, end_blocks)
    start_tokens, end_tokens = (jnp.where(is_used, x[rows], 0) for x in (starts, ends))
    tiles = Tile(rows, tile_tokens, positions, start_tokens, end_tokens, first_blocks, end_blocks)

    num_blocks = jnp.where(is_used, end_blocks - first_blocks, -1)
    order = jnp.argsort(-num_blocks).astype(jnp.int32)
    places = jnp.zeros_like(ids).at[order].set(ids, unique_indices=True)
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    rows = _interval(ends, tokens)
    offsets = tokens - first_tokens[rows]
    of_token = places[first_ids[rows] + offsets // tile]
    return Tiles(jnp.stack(tiles, axis=1)[order], of_token, offsets % tile)


def _interval(ends: Int32[Array, " n"], points: Int32[Array, " m"]) -> Int32[Array, " m"]:
    """For each point the first interval that ends after it; intervals follow one another from 0."""
    # Comparing all is one small kernel; a binary search would be a loop of kernels.
    return jnp.searchsorted(ends, points, side="right", method="compare_all").astype(jnp.int32)
