"""Paged decode attention for Hopper (H100, H200): split-KV, TMA ring, wgmma.

Decoding reads every key once for the few queries of its group: what counts is bytes in flight.

- Operands are swapped: keys fill the 64 rows of wgmma, Sᵀ = K Qᵀ and Oᵀ = Vᵀ Pᵀ, and the queries
  of a group are its columns, padded to a multiple of 8 (as in TensorRT-LLM's XQA). K and V go from
  shared memory to the tensor cores without passing through registers, and the accumulator of 8
  queries of head_dim 128 takes 8 registers of a thread.
- A persistent thread block has a warpgroup that copies and one that computes, connected by a ring
  of tiles, K and V in turn, one TMA copy per page. The ring runs on from one row to the next. Two
  thread blocks share an SM (one at head_dim 256): while one is in its softmax, the other's wgmma
  runs. Their rings together hold 190 KiB; 3.35 TB/s over 132 SMs and a latency of 1 us ask for 25.
- `plan` deals the same number of blocks to every thread block, up to one. With 8 kv heads of 4096
  keys and 132 SMs each reads two blocks of 64 keys, and the merge adds up 33 parts.
- Two launches per call: this kernel and the merge of its parts.
- What a tile holds outside the context or window is the nearest page of the row once more, which
  the L2 cache serves.

Compiled and interpreted only: not measured.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.checks import require_supported
from kernels_pallas.compat import pl, plgpu, set_apart, target, tiled_smem
from kernels_pallas.paged_decode_attention.mosaic_gpu_merge import merge
from kernels_pallas.paged_decode_attention.mosaic_gpu_softmax import LAYOUT, Softmax
from kernels_pallas.paged_decode_attention.plan import Plan, Segment, make_plan, segment_at
from kernels_pallas.powers import logits

DTYPES: Final = ("bfloat16", "float16")
HEAD_DIMS: Final = (64, 96, 128, 256)
PAGE_SIZES: Final = (16, 32, 64, 128)

MAX_GROUP: Final = 16
"""Queries whose accumulators leave room in the registers for two thread blocks on an SM."""

SMEM_BYTES: Final = 227 * 1024
"""Shared memory that the thread blocks of an SM can have."""

OTHER_SMEM_BYTES: Final = 4096
"""Of a thread block: barriers, reductions, alignment, and what the system takes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernel is compiled for.

    Attributes:
      num_heads: heads as the kernel sees them: a kv head with all its query heads, or with a part
        of them if they are many.
      group: query heads of one of these.
    """

    kv_heads: int
    num_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype

    @staticmethod
    def of(q: Float[Array, "B N H"], k_pages: Float[Array, "P K page H"]) -> "Shape":
        _, num_queries, head_dim = q.shape
        _, kv_heads, page_size, _ = k_pages.shape
        group = num_queries // kv_heads
        group = max(d for d in range(1, MAX_GROUP + 1) if group % d == 0)
        return Shape(kv_heads, num_queries // group, group, head_dim, page_size, q.dtype)

    @property
    def width(self) -> int:
        """head_dim, padded to the rows of wgmma."""
        return -(-self.head_dim // 64) * 64

    @property
    def columns(self) -> int:
        """Queries of a head, padded to the columns of wgmma."""
        return -(-self.group // 8) * 8

    @property
    def padded_group(self) -> int:
        """Queries of a head in global memory.

        TMA fills in and drops what is past the end of an array only in its last tile of 8.
        """
        return self.group if self.group < 8 else self.columns

    @property
    def block(self) -> int:
        """Keys of a tile."""
        return 128 if self.head_dim == 64 else 64

    @property
    def copied_rows(self) -> int:
        """Keys of one copy."""
        return min(self.block, self.page_size)

    @property
    def num_ctas_per_sm(self) -> int:
        return 1 if self.head_dim == 256 else 2

    @property
    def num_slots(self) -> int:
        """Tiles of the ring: as many as fit."""
        other = self.columns * (2 * self.width + self.block) * self.dtype.itemsize
        tile = self.block * self.width * self.dtype.itemsize
        return (SMEM_BYTES // self.num_ctas_per_sm - other - OTHER_SMEM_BYTES) // tile

    def smem(self, *size: int) -> Any:
        return tiled_smem(size, self.dtype, swizzle=64 if self.head_dim == 96 else 128)


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
    num_sms: int | None = None,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """See `kernels_pallas.paged_decode_attention.paged_decode_attention`.

    Args:
      num_sms: multiprocessors to fill; None is all that the process sees.
    """
    B, N, H = q.shape
    page_size = k_pages.shape[2]
    require_supported(q.dtype.name in DTYPES, "q.dtype", q.dtype.name, ", ".join(DTYPES))
    require_supported(H in HEAD_DIMS, "head_dim (q.shape[2])", H, str(HEAD_DIMS))
    require_supported(page_size in PAGE_SIZES, "page_size", page_size, str(PAGE_SIZES))
    shape = Shape.of(q, k_pages)
    plan = make_plan(
        context_lens,
        window,
        block=shape.block,
        num_heads=shape.num_heads,
        num_ctas=shape.num_ctas_per_sm * (target().num_sms if num_sms is None else num_sms),
    )
    queries = q.reshape(B, shape.num_heads, shape.group, H)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, shape.padded_group - shape.group), (0, 0)))
    queries, page_table = set_apart(queries, page_table)
    body = functools.partial(_body, shape=shape, scale=scale, window=window, soft_cap=soft_cap)
    acc, lse = _call(body, shape, plan, queries, k_pages, v_pages, page_table)
    out, lse = merge(plan.parts, acc, lse, padded_group=shape.padded_group, dtype=q.dtype)
    out, lse = out[:, :, : shape.group, :H], lse[:, :, : shape.group]
    return out.reshape(B, N, H), lse.reshape(B, N)


def _call(
    body: Callable[..., None],
    shape: Shape,
    plan: Plan,
    queries: Float[Array, "B heads padded_group H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
) -> tuple[Float32[Array, "parts width columns"], Float32[Array, "parts columns"]]:
    """Output and base-2 log-sum-exp of each part, numbered as in `plan.parts`."""
    num_ctas = plan.ctas.shape[0]
    num_parts = queries.shape[0] * shape.num_heads + num_ctas
    copies = shape.block // shape.copied_rows
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_parts, shape.width, shape.columns), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, shape.columns), jnp.float32),
        ),
        scratch_types={
            "ring": shape.smem(shape.num_slots, shape.block, shape.width),
            "queries": shape.smem(2, shape.columns, shape.width),
            "weights": shape.smem(shape.columns, shape.block),
            "lse": plgpu.SMEM((shape.columns,), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=copies, num_barriers=shape.num_slots),
            "free": plgpu.Barrier(num_barriers=shape.num_slots),
            "queries_full": plgpu.Barrier(num_barriers=2),
            "queries_free": plgpu.Barrier(num_barriers=2),
        },
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="paged_decode_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(queries, k_pages, v_pages, page_table, plan.rows, plan.ctas)


def _body(
    q_ref, k_ref, v_ref, table_ref, rows_ref, ctas_ref, acc_ref, lse_ref,
    *, ring, queries, weights, lse, full, free, queries_full, queries_free,
    shape: Shape, scale: float, window: int | None, soft_cap: float | None,
):  # fmt: skip
    """One thread block: tile 2 i of its ring is K of its i-th block, tile 2 i + 1 V."""
    num_slots = shape.num_slots

    def attend(index, done, segment: Segment):
        query_slot = lax.rem(index, 2)
        plgpu.barrier_wait(queries_full.at[query_slot])

        def attend_block(i, softmax: Softmax):
            tile = 2 * (done + i)
            k_slot, v_slot = lax.rem(tile, num_slots), lax.rem(tile + 1, num_slots)
            plgpu.barrier_wait(full.at[k_slot])
            products = _dot(ring.at[k_slot], queries.at[query_slot].T)
            plgpu.barrier_arrive(free.at[k_slot])
            key = plgpu.broadcasted_iota(jnp.int32, products.shape, 0, layout=LAYOUT)
            key += (segment.first_block + i) * shape.block
            visible = key < segment.length
            if window is not None:
                visible &= key >= segment.length - window
            x = jnp.where(visible, logits(products, scale, soft_cap), -jnp.inf)
            softmax, p = softmax.add(x)
            weights.T[...] = p.astype(shape.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(full.at[v_slot])
            acc = softmax.acc + _dot(ring.at[v_slot].T, weights.T)
            plgpu.barrier_arrive(free.at[v_slot])
            return softmax._replace(acc=acc)

        softmax = Softmax.empty(shape.block, shape.width, shape.columns)
        softmax = lax.fori_loop(0, segment.num_blocks, attend_block, softmax)
        plgpu.barrier_arrive(queries_free.at[query_slot])
        part = segment.row * shape.num_heads + segment.head + lax.axis_index("cta")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        acc_ref[part], lse[...] = softmax.finish()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[part])

    def copy(index, done, segment: Segment):
        query_slot = lax.rem(index, 2)
        head = lax.div(segment.head, shape.num_heads // shape.kv_heads)
        columns = pl.ds(0 * head, shape.columns)  # past their ends TMA fills in zeros
        width = pl.ds(0 * head, shape.width)

        @pl.when(index >= 2)
        def _():
            plgpu.barrier_wait(queries_free.at[query_slot])

        query_tile = queries.at[query_slot]
        barrier = queries_full.at[query_slot]
        query = q_ref.at[segment.row, segment.head, columns, width]
        plgpu.copy_gmem_to_smem(query, query_tile, barrier)

        @pl.loop(0, segment.num_blocks)
        def _(i):
            first_key = (segment.first_block + i) * shape.block
            offset = lax.rem(first_key, shape.page_size)
            starts = range(0, shape.block, shape.copied_rows)
            pages = [_page(segment, first_key + start, window, shape.page_size) for start in starts]
            page_ids = [table_ref[segment.row, page] for page in pages]
            for j, ref in enumerate((k_ref, v_ref)):
                tile = 2 * (done + i) + j
                slot = lax.rem(tile, num_slots)

                @pl.when(tile >= num_slots)
                def _(slot=slot):
                    plgpu.barrier_wait(free.at[slot])

                for page_id, start in zip(page_ids, starts, strict=True):
                    page = ref.at[page_id, head, pl.ds(offset, shape.copied_rows), width]
                    to = ring.at[slot, pl.ds(start, shape.copied_rows)]
                    plgpu.copy_gmem_to_smem(page, to, full.at[slot])

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _compute():
        _for_each_segment(rows_ref, ctas_ref, shape.num_heads, attend)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _copy():
        num_segments, num_blocks = _for_each_segment(rows_ref, ctas_ref, shape.num_heads, copy)

        @pl.loop(lax.max(2 * num_blocks - num_slots, 0), 2 * num_blocks)
        def _(tile):
            plgpu.barrier_wait(free.at[lax.rem(tile, num_slots)])

        @pl.loop(lax.max(num_segments - 2, 0), num_segments)
        def _(index):
            plgpu.barrier_wait(queries_free.at[lax.rem(index, 2)])


def _for_each_segment(
    rows_ref: Any, ctas_ref: Any, num_heads: int, body: Callable[[Any, Any, Segment], None]
) -> tuple[Any, Any]:
    """Calls body(segments before, blocks before, segment); returns how many of both there are."""
    row, start, end = (ctas_ref[lax.axis_index("cta"), i] for i in range(3))

    def step(state):
        index, position, row = state
        segment, row = segment_at(position, row, end, rows_ref=rows_ref, num_heads=num_heads)
        body(index, position - start, segment)
        return index + 1, position + segment.num_blocks, row

    first = jnp.int32(0), start, row
    count, position, _ = lax.while_loop(lambda state: state[1] < end, step, first)
    return count, position - start


def _page(segment: Segment, key: Any, window: int | None, page_size: int) -> Any:
    """Index in the row of the page of `key`, or of the nearest that the row sees."""
    page = lax.min(lax.div(key, page_size), lax.div(segment.length - 1, page_size))
    if window is None:
        return page
    return lax.max(page, lax.div(lax.max(segment.length - window, 0), page_size))


def _dot(a: Any, b: Any) -> Any:
    """a @ b, both in shared memory, in float32 registers."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))
