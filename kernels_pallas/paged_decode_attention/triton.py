"""Paged decode attention for any GPU that Triton compiles for: split-KV over gathered keys.

The work is dealt by `plan`, as on Hopper: every program reads the same number of blocks, up to
one. Keys are gathered token by token, so a page may have any size, and head_dim is padded to a
power of two. A second kernel merges the parts of each row.

Compiled and interpreted only: not measured.
"""

import functools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.checks import require_supported
from kernels_pallas.compat import pl, pltriton, target, triton_call
from kernels_pallas.paged_decode_attention.plan import Segment, make_plan, segment_at
from kernels_pallas.powers import LOG2E, logits

MAX_HEAD_DIM: Final = 256

MAX_GROUP: Final = 64
"""Query heads of a kv head that one program attends; the others read the keys again."""

PROGRAMS_PER_SM: Final = 2
MERGED: Final = 16
"""Parts that the merge loads together."""


class Softmax(NamedTuple):
    """Attention to the keys seen so far (arXiv 1805.02867), in powers of 2."""

    highest: Float32[Array, " G"]
    total: Float32[Array, " G"]
    acc: Float32[Array, "G H"]


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
    K = k_pages.shape[1]
    require_supported(H <= MAX_HEAD_DIM, "head_dim (q.shape[2])", H, f"at most {MAX_HEAD_DIM}")
    group = max(d for d in range(1, MAX_GROUP + 1) if (N // K) % d == 0)
    block = 64 if H * q.dtype.itemsize <= 256 else 32
    num_sms = max(target().num_sms, 1) if num_sms is None else num_sms
    plan = make_plan(
        context_lens,
        window,
        block=block,
        num_heads=N // group,
        num_ctas=PROGRAMS_PER_SM * num_sms,
    )
    num_ctas = plan.ctas.shape[0]
    num_parts = B * (N // group) + num_ctas
    accs, lses = triton_call(
        functools.partial(_attend, group, block, scale, window, soft_cap),
        out_shape=(
            jax.ShapeDtypeStruct((num_parts, group, H), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, group), jnp.float32),
        ),
        grid=(num_ctas,),
        num_warps=4,
        num_stages=2,
        name="paged_decode_attention",
    )(q, k_pages, v_pages, page_table, plan.rows, plan.ctas)
    out_shape = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N), jnp.float32)
    return triton_call(
        _merge,
        out_shape=out_shape,
        grid=(B, N),
        num_warps=4,
        num_stages=1,
        name="merge_decode_attention",
    )(plan.parts, accs, lses)


def _attend(
    group: int,
    block: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    q_ref,
    k_ref,
    v_ref,
    table_ref,
    rows_ref,
    ctas_ref,
    accs_ref,
    lses_ref,
):
    """One program: the parts between two positions of the plan."""
    num_queries, head_dim = q_ref.shape[1:]
    _, kv_heads, page_size, _ = k_ref.shape
    num_heads = num_queries // group
    query = jnp.arange(max(16, pl.next_power_of_2(group)), dtype=jnp.int32)
    column = jnp.arange(max(16, pl.next_power_of_2(head_dim)), dtype=jnp.int32)
    is_query, is_column = query < group, column < head_dim
    cta = pl.program_id(0)
    row, start, end = (ctas_ref[cta, i] for i in range(3))

    def attend(segment: Segment):
        row, head, length, first_block, num_blocks = segment
        index = (row, (head * group + query)[:, None], column[None])
        mask = is_query[:, None] & is_column[None]
        q = pltriton.load(q_ref.at[index], mask=mask, other=0.0)
        kv_head = lax.div(head, num_heads // kv_heads)
        first_key = 0 if window is None else lax.max(length - window, 0)

        def attend_block(j, softmax: Softmax):
            key = j * block + jnp.arange(block, dtype=jnp.int32)
            visible = (key >= first_key) & (key < length)
            page_id = pltriton.load(
                table_ref.at[row, lax.div(key, page_size)], mask=visible, other=0
            )
            index = (page_id[:, None], kv_head, lax.rem(key, page_size)[:, None], column[None])
            mask = visible[:, None] & is_column[None]
            k = pltriton.load(k_ref.at[index], mask=mask, other=0.0)
            v = pltriton.load(v_ref.at[index], mask=mask, other=0.0)
            x = logits(_dot(q, k.T), scale, soft_cap)
            x = jnp.where(visible[None], x, -jnp.inf)
            highest = jnp.maximum(softmax.highest, x.max(axis=1))
            keep = jnp.exp2(softmax.highest - highest)
            weights = jnp.exp2(x - highest[:, None])
            acc = softmax.acc * keep[:, None] + _dot(weights.astype(q.dtype), v)
            return Softmax(highest, softmax.total * keep + weights.sum(axis=1), acc)

        empty = Softmax(
            jnp.full(query.shape, -jnp.inf, jnp.float32),
            jnp.zeros(query.shape, jnp.float32),
            jnp.zeros((query.size, column.size), jnp.float32),
        )
        softmax = lax.fori_loop(first_block, first_block + num_blocks, attend_block, empty)
        part = row * num_heads + head + cta
        acc = softmax.acc / softmax.total[:, None]
        pltriton.store(accs_ref.at[part, query[:, None], column[None]], acc, mask=mask)
        lse = softmax.highest + jnp.log2(softmax.total)
        pltriton.store(lses_ref.at[part, query], lse, mask=is_query)

    def step(state):
        position, row = state
        segment, row = segment_at(position, row, end, rows_ref=rows_ref, num_heads=num_heads)
        attend(segment)
        return position + segment.num_blocks, row

    lax.while_loop(lambda state: state[0] < end, step, (start, row))


def _merge(parts_ref, accs_ref, lses_ref, out_ref, lse_ref):
    """One program: a row and a query head."""
    row, query = pl.program_id(0), pl.program_id(1)
    _, group, head_dim = accs_ref.shape
    head, query_in_head = lax.div(query, group), lax.rem(query, group)
    first, count = parts_ref[row, head, 0], parts_ref[row, head, 1]
    column = jnp.arange(max(16, pl.next_power_of_2(head_dim)), dtype=jnp.int32)
    is_column = column < head_dim

    def add_parts(i, state):
        highest, total, acc = state
        index = i * MERGED + jnp.arange(MERGED, dtype=jnp.int32)
        exists = index < count
        part = first + index
        lse = pltriton.load(lses_ref.at[part, query_in_head], mask=exists, other=-jnp.inf)
        at = (part[:, None], query_in_head, column[None])
        mask = exists[:, None] & is_column[None]
        outs = pltriton.load(accs_ref.at[at], mask=mask, other=0.0)
        new_highest = jnp.maximum(highest, lse.max())
        keep, weights = jnp.exp2(highest - new_highest), jnp.exp2(lse - new_highest)
        acc = acc * keep + (weights[:, None] * outs).sum(axis=0)
        return new_highest, total * keep + weights.sum(), acc

    state = jnp.float32(-jnp.inf), jnp.float32(0.0), jnp.zeros(column.shape, jnp.float32)
    state = lax.fori_loop(0, lax.div(count + (MERGED - 1), MERGED), add_parts, state)
    highest, total, acc = state
    seen = total > 0.0
    out = acc * jnp.where(seen, 1.0 / total, 0.0)
    pltriton.store(out_ref.at[row, query, column], out.astype(out_ref.dtype), mask=is_column)
    lse_ref[row, query] = jnp.where(seen, (highest + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)


def _dot(a: Any, b: Any) -> Any:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
