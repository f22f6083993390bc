"""Attention of one new token per row over that row's pages."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import jax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.checks import (
    Implementation,
    choose,
    require_options,
    require_pages,
    require_queries,
    require_rows,
)
from kernels_pallas.paged_decode_attention import mosaic_gpu, reference, triton

IMPLEMENTATIONS: Final[Mapping[Implementation, Callable]] = MappingProxyType(
    {
        "reference": reference.paged_decode_attention,
        "mosaic_gpu": mosaic_gpu.paged_decode_attention,
        "triton": triton.paged_decode_attention,
    }
)


# Layers that call it alike are lowered, and their kernels compiled, once.
@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "implementation"))
def paged_decode_attention(
    q: Float[Array, "B N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int32[Array, "B M"],
    context_lens: Int32[Array, " B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """Attends the last token of each row's context to that context.

    Token p of row b is at offset p % page of page `page_table[b, p // page]`; the pages already
    hold the new token. Query head n reads kv head n // (N // K). Slots past the end of the
    context may hold anything finite. Accumulates in float32.

    Args:
      q: query of each row's last token, float32, bfloat16 or float16.
      k_pages, v_pages: the pool, in the dtype of q.
      page_table: pages of each row; entries past the context may name any page of the pool.
      context_lens: tokens of each row, the new one included, at most M * page; 0 is a padding
        row, which costs nothing.
      scale: multiplies the logits; None is H ** -0.5.
      window: attend only to the last `window` tokens (sliding window); None is no limit.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap), after `scale`; None is off.
      implementation: a name in IMPLEMENTATIONS; None picks one for the device (`checks.choose`).

    Returns:
      (out, lse): out in the dtype of q, and the natural log-sum-exp of each row's logits. For a
      padding row out is 0 and lse -inf.

    Raises:
      ValueError, TypeError: an argument has a shape, dtype or value that is not allowed, by the op
        or by the implementation that was named; names it.
    """
    require_pages(k_pages, v_pages)
    require_queries(q, k_pages)
    require_rows(page_table, context_lens, q.shape[0])
    require_options(scale, window, soft_cap)
    return choose(IMPLEMENTATIONS, implementation)(
        q,
        k_pages,
        v_pages,
        page_table,
        context_lens,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
    )
