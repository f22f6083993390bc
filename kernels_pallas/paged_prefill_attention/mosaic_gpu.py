"""Paged prefill attention for Hopper (sm_90a), in the form of FlashAttention-3 (arXiv 2407.08608).

A thread block has three warpgroups: one issues TMA copies, two compute 64 rows of a tile each. A
row is a query of one head; a tile holds `gcd(G, 8)` of the G query heads that read one kv head, so
that short chunks fill it and long ones leave no row idle. The two take turns: while one keeps the
tensor cores busy, the other computes its softmax. Keys and values come through rings of blocks in
shared memory, one copy for each page of a block. A mask is computed only for blocks that need it:
at the diagonal and at the edge of the window.

The grid has a thread block for each possible tile and head; those without work end at once. The
hardware starts them in order, from the longest to the shortest, on whatever SMs are free: under an
SM share, or beside another process, a fixed assignment would wait for its slowest SM. The heads of
a tile run side by side and share their keys in L2.

One thread block of 384 threads and up to 226 KiB runs on an SM. At H = 128 a computing thread holds
64 registers of output, 64 of logits and 32 of weights, and may have 232. A block of 128 keys is
64 KiB for 8.4 MFLOP: at 4.5 TFLOP/s per SM, 35 GB/s per SM from L2.

Compiled and interpreted only: not measured.
"""

import functools
import math
from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.checks import require_supported
from kernels_pallas.compat import pl, plgpu, set_apart, tiled_smem
from kernels_pallas.paged_prefill_attention.tiles import Tile, cut

HEAD_DIMS: Final = (64, 96, 128, 256)
PAGE_SIZES: Final = (16, 32, 64, 128)
DTYPES: Final = ("bfloat16", "float16")

ROWS: Final = 64
"""Rows of a tile that one warpgroup computes: the M of wgmma."""

WARPGROUPS: Final = 2
"""Warpgroups that compute."""

ALIGN: Final = 8
"""Rows that lie together in shared memory, as wgmma wants it: copies of q go in such steps."""

SHARED_BYTES: Final = 224 * 1024
"""For queries, keys, values and output; barriers take some of the 227 KiB of an SM."""

LOG2E: Final = math.log2(math.e)

LOWEST: Final = -1e30
"""Largest logit where no key was seen: finite, so that exp2(-inf - LOWEST) is 0 and not NaN."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a tile and of what it is computed from.

    Attributes:
      group: query heads of a kv head.
    """

    group: int
    head_dim: int
    page_size: int

    @property
    def heads(self) -> int:
        """Query heads in a tile."""
        return math.gcd(self.group, 8)

    @property
    def tokens(self) -> int:
        """Query tokens of one warpgroup."""
        return ROWS // self.heads

    @property
    def block(self) -> int:
        """Keys in a block."""
        return 128 if self.head_dim <= 128 else 64

    @property
    def run(self) -> int:
        """Keys that one copy fetches."""
        return min(self.block, self.page_size)

    @property
    def value_dim(self) -> int:
        """head_dim of values and output, padded so that TMA can copy a single row.

        A row in shared memory has to start at a multiple of 128 bytes; 96 items have 192. TMA fills
        in zeros past the end of the values.
        """
        return -(-self.head_dim // 64) * 64

    @property
    def width(self) -> int:
        """Columns of the output that are written at once."""
        return min(self.value_dim, 128)

    @property
    def stages(self) -> int:
        """Blocks in a ring."""
        fixed = WARPGROUPS * ROWS * (self.head_dim + self.width) * 2
        block = self.block * (self.head_dim + self.value_dim) * 2
        return min(4, (SHARED_BYTES - fixed) // block)


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
    for name, value, allowed in (
        ("q.dtype", q.dtype.name, DTYPES),
        ("head_dim", q.shape[2], HEAD_DIMS),
        ("page_size", k_pages.shape[2], PAGE_SIZES),
    ):
        require_supported(value in allowed, name, value, ", ".join(map(str, allowed)))
    num_tokens = len(q)
    q = jnp.pad(q, ((0, -num_tokens % ALIGN), (0, 0), (0, 0)))
    q, page_table = set_apart(q, page_table)
    T, N, H = q.shape
    K, page_size = k_pages.shape[1:3]
    shape = Shape(N // K, H, page_size)
    tiles = cut(
        cu_q_lens,
        context_lens,
        num_tokens=T,
        tile=WARPGROUPS * shape.tokens,
        align=ALIGN,
        block=shape.block,
        window=window,
    )
    max_tiles, head_tiles = len(tiles.table), N // shape.heads
    rows = (WARPGROUPS, ROWS)
    smem = functools.partial(tiled_smem, dtype=q.dtype, swizzle=128 if H % 64 == 0 else 64)
    full = plgpu.Barrier(num_arrivals=shape.block // shape.run, num_barriers=shape.stages)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=shape.stages)
    out, lse = plgpu.kernel(
        _body(shape, head_tiles, scale, window, soft_cap),
        out_type=[
            jax.ShapeDtypeStruct((T, N, shape.value_dim), q.dtype),
            jax.ShapeDtypeStruct((max_tiles, head_tiles, *rows), jnp.float32),
        ],
        scratch_types={
            "q_smem": smem((*rows, H)),
            "k_smem": smem((shape.stages, shape.block, H)),
            "v_smem": smem((shape.stages, shape.block, shape.value_dim)),
            "out_smem": tiled_smem((*rows, shape.width), q.dtype, rows=1),
            "q_full": plgpu.Barrier(num_arrivals=shape.heads, num_barriers=WARPGROUPS),
            "k_full": full,
            "v_full": full,
            "k_free": free,
            "v_free": free,
            "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        grid=(max_tiles * head_tiles,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k_pages, v_pages, page_table, tiles.table)
    lse = lse.reshape(max_tiles, head_tiles, WARPGROUPS, shape.heads, shape.tokens)
    warpgroup, token = tiles.offset // shape.tokens, tiles.offset % shape.tokens
    lse = lse[tiles.of_token, :, warpgroup, :, token].reshape(T, N)
    return out[:num_tokens, :, :H], lse[:num_tokens]


def _body(shape: Shape, head_tiles: int, scale: float, window: int | None, soft_cap: float | None):
    heads, tokens, block, stages = shape.heads, shape.tokens, shape.block, shape.stages
    layout = plgpu.Layout.WGMMA

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def broadcast(vector, like, axis=0):
        return lax.broadcast_in_dim(vector, like.shape, [axis])

    def body(
        q_ref,
        k_ref,
        v_ref,
        page_table_ref,
        tiles_ref,
        out_ref,
        lse_ref,
        *,
        q_smem,
        k_smem,
        v_smem,
        out_smem,
        q_full,
        k_full,
        v_full,
        k_free,
        v_free,
        turn,
    ):
        number = lax.div(lax.axis_index("block"), head_tiles)
        head_tile = lax.rem(lax.axis_index("block"), head_tiles)
        warpgroup = lax.axis_index("warpgroup")
        tile = Tile(*(tiles_ref[number, field] for field in range(len(Tile._fields))))
        has_keys = tile.first_block < tile.end_block

        def slot_of(j):
            return lax.rem(j - tile.first_block, stages)

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute():
            plgpu.set_max_registers(232, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
            acc, highest, total = attend(tile.position + warpgroup * tokens)
            seen = total > 0.0
            lse = (highest + jnp.log2(total)) * (1 / LOG2E)
            lse_ref[number, head_tile, warpgroup] = jnp.where(seen, lse, -jnp.inf)
            acc = acc * broadcast(jnp.where(seen, 1.0 / total, 0.0), acc)
            write(acc.astype(q_ref.dtype), tile.first_token + warpgroup * tokens)

        def attend(position):
            """(output, largest logit, sum) of this warpgroup's rows, whose first is at `position`.

            Logits are in base 2; the output is not yet divided by the sum.
            """

            def visible(j, logits):
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
                key = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=layout.reduce(0))
                # Else it is computed before all loops and takes a register for each key.
                key = broadcast(lax.optimization_barrier(key), logits, axis=1)
                last = broadcast((row & (tokens - 1)) + (position - j * block), logits)
                return key <= last if window is None else (key <= last) & (key > last - window)

            def attend_block(masked, j, state):
                acc, highest, total = state
                slot = slot_of(j)

                def dot_keys(acc_ref):
                    plgpu.wgmma(acc_ref, q_smem.at[warpgroup], k_smem.at[slot].transpose((1, 0)))
                    take_turn()
                    return acc_ref[...]

                def dot_values(acc_ref):
                    plgpu.wgmma(acc_ref, weights, v_smem.at[slot])

                    @pl.when(j + 1 < tile.end_block)
                    def await_next_keys():
                        plgpu.barrier_wait(k_full.at[slot_of(j + 1)])

                logits = pl.run_scoped(
                    dot_keys, plgpu.WGMMAAccumulatorRef((ROWS, block), jnp.float32)
                )
                plgpu.barrier_arrive(k_free.at[slot])
                factor = scale * LOG2E
                if soft_cap is not None:
                    # tanh by exp2: the tanh of approx_math is off by up to 5e-4
                    raised = jnp.exp2(logits * (2 * factor / soft_cap)) + 1.0
                    logits, factor = (soft_cap * LOG2E) * (1.0 - 2.0 / raised), 1.0
                if masked:
                    logits = jnp.where(visible(j, logits), logits, -jnp.inf)
                new_highest = jnp.maximum(highest, logits.max(axis=1) * factor)
                keep = jnp.exp2(highest - new_highest)
                weights = jnp.exp2(logits * factor - broadcast(new_highest, logits))
                total = total * keep + weights.sum(axis=1)
                acc = acc * broadcast(keep, acc)
                weights = weights.astype(q_ref.dtype)
                # All of the softmax is done before the turn is over.
                acc, weights, total, new_highest = lax.optimization_barrier(
                    (acc, weights, total, new_highest)
                )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)
                acc = pl.run_state(dot_values)(plgpu.WGMMAAccumulatorRef.init(acc))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_highest, total

            @pl.when(has_keys)
            def await_first_keys_and_queries():
                plgpu.barrier_wait(k_full.at[0])
                plgpu.barrier_wait(q_full.at[warpgroup])

            pl.when(warpgroup == 1)(take_turn)
            state = (
                full((ROWS, shape.value_dim), 0.0, layout),
                full((ROWS,), LOWEST, layout.reduce(1)),
                full((ROWS,), 0.0, layout.reduce(1)),
            )
            first, end = tile.first_block, tile.end_block
            if window is not None:
                edge = lax.div(lax.max(position + tokens - window, 0) + (block - 1), block)
                edge = lax.clamp(first, edge, end)
                state = lax.fori_loop(first, edge, functools.partial(attend_block, True), state)
                first = edge
            diagonal = lax.clamp(first, lax.div(lax.max(position + 1, 0), block), end)
            state = lax.fori_loop(first, diagonal, functools.partial(attend_block, False), state)
            state = lax.fori_loop(diagonal, end, functools.partial(attend_block, True), state)
            pl.when(warpgroup == 0)(take_turn)
            return state

        def write(out, first_token):
            start = lax.clamp(0, tile.start_token - first_token, tokens)
            end = lax.clamp(0, tile.end_token - first_token, tokens)
            smem = out_smem.at[warpgroup]

            for first_column in range(0, shape.value_dim, shape.width):
                columns = slice(first_column, first_column + shape.width)

                def copy(first, size, columns=columns):
                    for head in range(heads):
                        plgpu.copy_smem_to_gmem(
                            smem.at[pl.ds(head * tokens + first, size)],
                            out_ref.at[
                                pl.ds(first_token + first, size), head_tile * heads + head, columns
                            ],
                        )

                smem[...] = out[:, columns]
                plgpu.commit_smem()
                is_whole = end - start == tokens
                pl.when(is_whole)(functools.partial(copy, 0, tokens))
                # The other rows belong to other chunks.
                pl.when(~is_whole)(lambda copy=copy: pl.loop(start, end)(lambda i: copy(i, 1)))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def fetch():
            plgpu.set_max_registers(40, action="decrease")
            pl.loop(tile.first_block, tile.end_block)(fetch_block)
            for i in range(stages):  # which slots, is not static: 40 registers hold no addresses
                slot = slot_of(tile.end_block + i)
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

        def fetch_block(j):
            slot = slot_of(j)
            keys = [j * block + start for start in range(0, block, shape.run)]
            last = page_table_ref.shape[1] - 1
            pages = [lax.min(lax.div(key, shape.page_size), last) for key in keys]
            page_ids = [page_table_ref[tile.row, page] for page in pages]
            kv_head = lax.div(head_tile * heads, shape.group)

            def fetch_pages(pages_ref, smem, full, free):
                columns = pl.ds(0 * slot, smem.shape[-1])
                plgpu.barrier_wait(free.at[slot])
                for i, (key, page_id) in enumerate(zip(keys, page_ids, strict=True)):
                    start = lax.rem(key, shape.page_size)
                    plgpu.copy_gmem_to_smem(
                        pages_ref.at[page_id, kv_head, pl.ds(start, shape.run), columns],
                        smem.at[slot, pl.ds(i * shape.run, shape.run)],
                        full.at[slot],
                    )

            fetch_pages(k_ref, k_smem, k_full, k_free)
            pl.when(j == tile.first_block)(fetch_queries)
            fetch_pages(v_ref, v_smem, v_full, v_free)

        def fetch_queries():
            for i in range(WARPGROUPS):
                first_token = pl.multiple_of(tile.first_token + i * tokens, ALIGN)
                for head in range(heads):
                    plgpu.copy_gmem_to_smem(
                        q_ref.at[pl.ds(first_token, tokens), head_tile * heads + head],
                        q_smem.at[i, pl.ds(head * tokens, tokens)],
                        q_full.at[i],
                    )

        is_used = tile.start_token < tile.end_token
        pl.when(is_used & (warpgroup < WARPGROUPS))(compute)
        pl.when(is_used & (warpgroup == WARPGROUPS))(fetch)

    return body
