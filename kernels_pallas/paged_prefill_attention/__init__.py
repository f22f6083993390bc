"""Causal attention of a ragged batch of prompt chunks over their pages."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import jax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.checks import (
    Implementation,
    choose,
    require_array,
    require_options,
    require_pages,
    require_queries,
    require_rows,
)
from kernels_pallas.paged_prefill_attention import mosaic_gpu, reference, triton

IMPLEMENTATIONS: Final[Mapping[Implementation, Callable]] = MappingProxyType(
    {
        "reference": reference.paged_prefill_attention,
        "mosaic_gpu": mosaic_gpu.paged_prefill_attention,
        "triton": triton.paged_prefill_attention,
    }
)


# Layers that call it alike are lowered, and their kernels compiled, once.
@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "implementation"))
def paged_prefill_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    cu_q_lens: Int32[Array, " R1"],
    page_table: Int32[Array, "R M"],
    context_lens: Int32[Array, " R"],
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """Attends each chunk's tokens causally to all earlier tokens of their context.

    Chunk r has the queries cu_q_lens[r] : cu_q_lens[r + 1], the last tokens of its context. Token
    p of chunk r's context is at offset p % page of page `page_table[r, p // page]`; the pages
    already hold the chunk itself. Query head n reads kv head n // (N // K). Slots past the end of
    the context may hold anything finite. Accumulates in float32.

    Args:
      q: queries of all chunks, one after another, float32, bfloat16 or float16. Tokens from
        cu_q_lens[R] on are padding.
      k_pages, v_pages: the pool, in the dtype of q.
      cu_q_lens: [R + 1] cumulative chunk lengths, from 0, at most T; a chunk may be empty.
      page_table: pages of each chunk; entries past the context may name any page of the pool.
      context_lens: tokens of each chunk's context, the chunk included, at most M * page.
      scale: multiplies the logits; None is H ** -0.5.
      window: each token attends only to the last `window` tokens up to and including itself
        (sliding window); None is no limit.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap), after `scale`; None is off.
      implementation: a name in IMPLEMENTATIONS; None picks one.

    Returns:
      (out, lse): out in the dtype of q, and the natural log-sum-exp of each token's logits. For
      padding tokens out is 0 and lse -inf.

    Raises:
      ValueError, TypeError: an argument has a shape, dtype or value that is not allowed; names it.
    """
    require_pages(k_pages, v_pages)
    require_queries(q, k_pages)
    require_rows(page_table, context_lens, None)
    require_array("cu_q_lens", cu_q_lens, (page_table.shape[0] + 1,), "int32")
    require_options(scale, window, soft_cap)
    return choose(IMPLEMENTATIONS, implementation)(
        q,
        k_pages,
        v_pages,
        cu_q_lens,
        page_table,
        context_lens,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
    )
