"""How large everything is and where it lies. Pure: sizes in, two regions and a layout out."""

import math
from dataclasses import dataclass
from typing import Final

from semipd_jax.config import EngineConfig
from semipd_jax.errors import StartupError
from semipd_jax.messages import MemoryLayout
from semipd_jax.models.spec import ModelSpec
from semipd_jax.storage.budget import Budget
from semipd_jax.storage.manifest import ALIGNMENT, STATE, WEIGHTS, Region, lay_out, numpy_dtype

_POOL_SHARE: Final = 0.25
"""Most of what the weights leave that the KV pool takes from memory that others need too."""

_LIVE_ACTIVATIONS: Final = 4
"""Float32 arrays of a step's widest shape that are alive at once, at most. An estimate."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    weights: Region
    state: Region
    layout: MemoryLayout


def plan_memory(
    spec: ModelSpec,
    config: EngineConfig,
    *,
    eos_token_ids: tuple[int, ...],
    budget: Budget,
    default_dtype: str | None,
    default_page_size: int,
) -> MemoryPlan:
    """Raises StartupError that says what to change if the model or one full request cannot fit.

    Args:
      default_dtype: of a model whose dtype was left open; None means the checkpoint's.
      default_page_size: tokens of a page, if that was left open.
    """
    asked = config.model.dtype
    dtype = asked if asked != "auto" else default_dtype or spec.checkpoint_dtype
    max_model_len = spec.max_len(config.model.max_model_len)
    num_rows = config.scheduler.max_num_seqs + 1
    page_size = config.cache.page_size or default_page_size
    weights = lay_out(WEIGHTS, ((weight.path, weight.shape, dtype) for weight in spec.weights))
    if weights.num_bytes > budget.available_bytes:
        raise StartupError(
            f"the weights need {_gib(weights.num_bytes)} as {dtype}, but only {_available(budget)}"
        )
    page_bytes = _page_bytes(spec, page_size, dtype)
    rest = _lay_out_state(spec, page_size, dtype, 0, num_rows, max_model_len)
    padding = ALIGNMENT * len(rest.arrays)
    free_bytes = budget.available_bytes - weights.num_bytes - rest.num_bytes - padding
    longest = -(-max_model_len // page_size)
    num_pages = _num_pages(
        config, longest, page_bytes, free_bytes, takes_rest=budget.pool_takes_rest
    )
    if num_pages < 1 + longest:
        raise StartupError(
            f"a KV pool of {_gib(num_pages * page_bytes)} holds "
            f"{max(num_pages - 1, 0) * page_size} tokens, fewer than one request of max_model_len "
            f"{max_model_len}: lower max_model_len, or set kv_cache_memory_bytes to at least "
            f"{(1 + longest) * page_bytes}"
        )
    state = _lay_out_state(spec, page_size, dtype, num_pages, num_rows, max_model_len)
    if weights.num_bytes + state.num_bytes > budget.available_bytes:
        raise StartupError(
            f"weights and KV pool need {_gib(weights.num_bytes + state.num_bytes)}, but only "
            f"{_available(budget)}: lower kv_cache_memory_bytes"
        )
    layout = MemoryLayout(
        dtype=dtype,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=num_pages,
        num_rows=num_rows,
        weight_bytes=weights.num_bytes,
        kv_bytes=num_pages * page_bytes,
        eos_token_ids=eos_token_ids,
        worker_fraction=budget.worker_fraction,
    )
    return MemoryPlan(weights, state, layout)


def activation_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """An upper estimate of what one worker's largest step allocates: activations and logits.

    The widest activation of a token is as wide as a weight, which may be fused of several.
    """
    limits = config.scheduler
    num_tokens, num_rows = limits.max_num_batched_tokens, limits.max_num_seqs
    if config.mode == "chunked":  # each part of a mixed step is padded to its own limit
        num_tokens, num_rows = num_tokens + num_rows, 2 * num_rows
    dims = [dim for weight in spec.weights for dim in weight.shape if dim != spec.vocab_size]
    return 4 * _LIVE_ACTIVATIONS * (num_tokens * max(dims, default=1) + num_rows * spec.vocab_size)


def summary(plan: MemoryPlan, budget: Budget) -> str:
    """One line for the log."""
    layout = plan.layout
    num_tokens = (layout.num_pages - 1) * layout.page_size
    return (
        f"memory: {_gib(layout.weight_bytes)} of weights ({layout.dtype}), "
        f"{_gib(layout.kv_bytes)} of KV pages for {num_tokens} tokens; {_available(budget)}"
    )


def _page_bytes(spec: ModelSpec, page_size: int, dtype: str) -> int:
    """Bytes of one page of all layers."""
    elements = sum(math.prod(array.page_shape) for array in spec.kv_layout(page_size))
    return spec.num_layers * elements * numpy_dtype(dtype).itemsize


def _num_pages(
    config: EngineConfig, longest: int, page_bytes: int, free_bytes: int, *, takes_rest: bool
) -> int:
    """Pages of the pool, scratch page included: as asked for, else all, or what rows could fill.

    `longest` is the number of pages of the longest request.
    """
    pool_bytes = config.cache.memory_bytes
    if pool_bytes is not None:
        return pool_bytes // page_bytes
    room = int(max(free_bytes, 0) * (1.0 if takes_rest else _POOL_SHARE)) // page_bytes
    wanted = room if takes_rest else 1 + config.scheduler.max_num_seqs * longest
    return wanted if wanted < room else _steady(room, least=1 + longest)


def _steady(num_pages: int, least: int) -> int:
    """Programs are compiled for a pool's size. By giving up at most 1/64 of it, what is free may
    differ a little from start to start and yet lead to the same programs."""
    step = 1 << max(num_pages.bit_length() - 7, 0)
    rounded = num_pages // step * step
    return rounded if rounded >= least else num_pages


def _lay_out_state(
    spec: ModelSpec, page_size: int, dtype: str, num_pages: int, num_rows: int, max_model_len: int
) -> Region:
    pools = [
        (f"layers/{layer}/{array.name}", (num_pages, *array.page_shape), dtype)
        for layer in range(spec.num_layers)
        for array in spec.kv_layout(page_size)
    ]
    tokens = ("tokens", (num_rows, max_model_len + 1), "int32")
    return lay_out(STATE, [*pools, tokens], writable=True)


def _available(budget: Budget) -> str:
    detail = f" ({budget.detail})" if budget.detail else ""
    return f"{_gib(budget.available_bytes)} of memory are available{detail}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
