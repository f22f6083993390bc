"""The two step functions: pure in form, shared state donated, written in place.

Both run the model over a flat axis of tokens. Layer by layer the new keys and values go into their
slots, then attention reads the pages. Only slots and positions that the batch names are written,
and nothing reads an old value of a shared array after its update: either would make XLA copy the
array and undo what other processes wrote meanwhile.

Running a step again gives the same state and the same tokens.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas import kv_write, paged_decode_attention, paged_prefill_attention
from semipd_jax.runtime.batch import DecodeBatch, PrefillBatch
from semipd_jax.runtime.sampling import StepOutput, empty_output, sample
from semipd_jax.runtime.state import LayerCache, SharedState


def prefill_step(
    model: Any, state: SharedState, batch: PrefillBatch
) -> tuple[StepOutput, SharedState]:
    """Runs one chunk of each request; samples a token where the chunk is the prompt's last.

    Args:
      model: a module of `semipd_jax.models`, merged with its parameters.
    """
    request, positions, is_real = _locate(batch)
    pages = batch.page_table[request, positions // _page_size(state)]
    slots = _slots(pages, positions, is_real, _page_size(state))
    tokens = _put(state.tokens, batch.rows[request], positions, batch.token_ids, is_real)

    def attention(
        q: Float[Array, "T N H"], cache: LayerCache, window: int | None
    ) -> Float[Array, "T N H"]:
        out, _ = paged_prefill_attention(
            q,
            cache["k_pages"],
            cache["v_pages"],
            batch.cu_q_lens,
            batch.page_table,
            batch.context_lens,
            window=window,
        )
        return out

    attend = _writing_to(slots, attention)
    hidden, layers = model(batch.token_ids, positions, state.layers, attend)
    last = jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
    output = lax.cond(
        jnp.any(batch.samples),
        lambda: sample(
            model.logits(hidden[last]), batch.sampling, tokens, batch.rows, batch.context_lens
        ),
        lambda: empty_output(batch.rows.shape[0]),
    )
    tokens = _put(tokens, batch.rows, batch.context_lens, output.token_ids, batch.samples)
    return output, SharedState(layers=layers, tokens=tokens)


def decode_step(
    model: Any, state: SharedState, batch: DecodeBatch
) -> tuple[StepOutput, SharedState]:
    """Generates one token for each row from the last token that the shared state holds of it.

    Args:
      model: a module of `semipd_jax.models`, merged with its parameters.
    """
    is_real = batch.context_lens > 0
    positions = jnp.maximum(batch.context_lens - 1, 0)
    row = jnp.arange(batch.rows.shape[0], dtype=jnp.int32)
    pages = batch.page_table[row, positions // _page_size(state)]
    slots = _slots(pages, positions, is_real, _page_size(state))

    def attention(
        q: Float[Array, "B N H"], cache: LayerCache, window: int | None
    ) -> Float[Array, "B N H"]:
        out, _ = paged_decode_attention(
            q,
            cache["k_pages"],
            cache["v_pages"],
            batch.page_table,
            batch.context_lens,
            window=window,
        )
        return out

    token_ids = state.tokens[batch.rows, positions]
    hidden, layers = model(token_ids, positions, state.layers, _writing_to(slots, attention))
    output = sample(
        model.logits(hidden), batch.sampling, state.tokens, batch.rows, batch.context_lens
    )
    tokens = _put(state.tokens, batch.rows, batch.context_lens, output.token_ids, is_real)
    return output, SharedState(layers=layers, tokens=tokens)


def _locate(
    batch: PrefillBatch,
) -> tuple[Int32[Array, " T"], Int32[Array, " T"], Array]:
    """Of each token: its request, its position there, and whether it is one (not padding)."""
    t = jnp.arange(batch.token_ids.shape[0], dtype=jnp.int32)
    ends = batch.cu_q_lens[1:]
    request = jnp.sum(t[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    request = jnp.minimum(request, ends.shape[0] - 1)
    positions = batch.context_lens[request] - (ends[request] - t)
    is_real = t < ends[-1]
    return request, jnp.where(is_real, positions, 0), is_real


def _slots(
    pages: Int32[Array, " T"], positions: Int32[Array, " T"], is_real: Array, page_size: int
) -> Int32[Array, " T"]:
    """Where each token's keys and values go; -1 for padding."""
    return jnp.where(is_real, pages * page_size + positions % page_size, -1)


def _put(
    tokens: Int32[Array, "rows length"],
    rows: Int32[Array, " n"],
    positions: Int32[Array, " n"],
    token_ids: Int32[Array, " n"],
    is_real: Array,
) -> Int32[Array, "rows length"]:
    """Writes tokens[rows, positions] where `is_real`, and nothing elsewhere."""
    rows = jnp.where(is_real, rows, tokens.shape[0])
    return tokens.at[rows, positions].set(token_ids, mode="drop")


def _writing_to(slots: Int32[Array, " T"], attention: Callable[..., Array]) -> Callable[..., Any]:
    """The model's `attend`: writes the new keys and values, then attends over the pages."""

    def attend(
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: LayerCache,
        window: int | None,
    ) -> tuple[Float[Array, "T N H"], LayerCache]:
        k_pages, v_pages = kv_write(cache["k_pages"], cache["v_pages"], k, v, slots)
        cache = {"k_pages": k_pages, "v_pages": v_pages}
        return attention(q, cache, window), cache

    return attend


def _page_size(state: SharedState) -> int:
    return state.layers[0]["k_pages"].shape[2]
