"""Norms, rotary embedding and writing KV in one kernel, for any GPU that Triton compiles for.

A program has K heads of a token: a part of its queries, its keys or its values. Compiled and
interpreted only: not measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.compat import pl, pltriton, triton_call

_K_PAGES, _V_PAGES = 4, 5  # among the arguments of the kernel


def rope_kv_write(
    qkv: Float[Array, "T NKK H"],
    cos: Float32[Array, "T half"],
    sin: Float32[Array, "T half"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    slot_mapping: Int32[Array, " T"],
    q_norm: Float[Array, " H"] | None,
    k_norm: Float[Array, " H"] | None,
    *,
    eps: float,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """See `kernels_pallas.rope_kv_write.rope_kv_write`."""
    T, heads, H = qkv.shape
    K = k_pages.shape[1]
    norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
    out_shape = [
        jax.ShapeDtypeStruct((T, heads - 2 * K, H), qkv.dtype),
        *(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_pages, v_pages)),
    ]
    return triton_call(
        functools.partial(_body, len(norms), eps),
        out_shape=out_shape,
        grid=(T, heads // K),
        input_output_aliases={_K_PAGES: 1, _V_PAGES: 2},
        num_warps=4,
        num_stages=1,
        name="rope_kv_write",
    )(qkv, cos, sin, slot_mapping, k_pages, v_pages, *norms)


def _body(num_norms: int, eps: float, qkv_ref, cos_ref, sin_ref, slots_ref, _k, _v, *refs):
    norm_refs, (q_ref, k_ref, v_ref) = refs[:num_norms], refs[num_norms:]
    _, kv_heads, page_size, head_dim = k_ref.shape
    half = head_dim // 2
    token, part = pl.program_id(0), pl.program_id(1)
    num_query_parts = q_ref.shape[1] // kv_heads
    head = jnp.arange(pl.next_power_of_2(kv_heads), dtype=jnp.int32)[:, None]
    column = jnp.arange(pl.next_power_of_2(half), dtype=jnp.int32)
    is_column = column < half
    mask = (head < kv_heads) & is_column[None]
    slot = slots_ref[token]
    page_id, offset = lax.div(slot, page_size), lax.rem(slot, page_size)

    def load(first_column: int) -> Any:
        index = (token, part * kv_heads + head, first_column + column[None])
        return pltriton.load(qkv_ref.at[index], mask=mask, other=0.0)

    first, second = load(0), load(half)

    def turned(norm: int) -> tuple[Any, Any]:
        x, y = first.astype(jnp.float32), second.astype(jnp.float32)
        if norm_refs:
            mean = ((x * x).sum(axis=1) + (y * y).sum(axis=1)) / head_dim
            scale = lax.rsqrt(mean + eps)[:, None]
            x, y = (normed(z, scale, norm, i * half) for i, z in enumerate((x, y)))
        cos, sin = (
            pltriton.load(ref.at[token, column], mask=is_column, other=0.0)[None]
            for ref in (cos_ref, sin_ref)
        )
        return x * cos - y * sin, y * cos + x * sin

    def normed(x: Any, scale: Any, norm: int, first_column: int) -> Any:
        ref = norm_refs[norm].at[first_column + column]
        weight = pltriton.load(ref, mask=is_column, other=0.0).astype(jnp.float32)
        return (x * scale * weight[None]).astype(first.dtype).astype(jnp.float32)

    def store(ref: Any, index: tuple[Any, ...], halves: tuple[Any, Any]) -> None:
        for i, values in enumerate(halves):
            at = ref.at[*index, i * half + column[None]]
            pltriton.store(at, values.astype(first.dtype), mask=mask)

    @pl.when(part < num_query_parts)
    def _queries():
        store(q_ref, (token, part * kv_heads + head), turned(0))

    @pl.when((part == num_query_parts) & (slot >= 0))
    def _keys():
        store(k_ref, (page_id, head, offset), turned(1))

    @pl.when((part == num_query_parts + 1) & (slot >= 0))
    def _values():
        store(v_ref, (page_id, head, offset), (first, second))
