"""The step functions: pure in form, shared state donated, written in place.

All run the model over one flat axis of tokens: those of a batch, or of two. Layer by layer the new
keys and values go into their slots, then attention reads the pages. Only slots and positions that
the batch names are written, and nothing reads an old value of a shared array after its update:
either would make XLA copy the array and undo what other processes wrote meanwhile.

Running a step again gives the same state and the same tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import kv_write, paged_decode_attention, paged_prefill_attention
from semipd_jax.runtime.batch import (
    DecodeBatch,
    MixedBatch,
    PrefillBatch,
    Sampling,
    join_sampling,
)
from semipd_jax.runtime.sampling import StepOutput, empty_output, sample
from semipd_jax.runtime.state import LayerCache, SharedState


class _Part(NamedTuple):
    """A batch's part of the axis of tokens.

    Attributes:
      slots: where each token's keys and values go; -1 for padding.
      attention: of the part's queries over the pages: (queries, layer, window) -> output.
      last: hidden states of the part's tokens -> those that its rows may sample from.
      samples: the rows that do; they choose `tokens[rows, context_lens]`.
    """

    token_ids: Int32[Array, " T"]
    positions: Int32[Array, " T"]
    slots: Int32[Array, " T"]
    attention: Callable[[Array, LayerCache, int | None], Array]
    last: Callable[[Array], Array]
    rows: Int32[Array, " R"]
    context_lens: Int32[Array, " R"]
    samples: Bool[Array, " R"]
    sampling: Sampling


def prefill_step(
    model: Any, state: SharedState, batch: PrefillBatch
) -> tuple[StepOutput, SharedState]:
    """Runs one chunk of each request; samples a token where the chunk is the prompt's last.

    Args:
      model: a module of `semipd_jax.models`, merged with its parameters.
    """
    state, part = _prefill_part(state, batch)
    hidden, state = _forward(model, state, [part])
    return _sample(model, state, [part], hidden, may_be_none=True)


def decode_step(
    model: Any, state: SharedState, batch: DecodeBatch
) -> tuple[StepOutput, SharedState]:
    """Generates one token for each row from the last token that the shared state holds of it.

    Args:
      model: a module of `semipd_jax.models`, merged with its parameters.
    """
    part = _decode_part(state, batch)
    hidden, state = _forward(model, state, [part])
    return _sample(model, state, [part], hidden)


def mixed_step(model: Any, state: SharedState, batch: MixedBatch) -> tuple[StepOutput, SharedState]:
    """Both in one forward pass. The rows of the output are those of the decode batch, then those of
    the prefill batch.

    Args:
      model: a module of `semipd_jax.models`, merged with its parameters.
    """
    state, prefill = _prefill_part(state, batch.prefill)
    parts = [_decode_part(state, batch.decode), prefill]
    hidden, state = _forward(model, state, parts)
    return _sample(model, state, parts, hidden)


def _prefill_part(state: SharedState, batch: PrefillBatch) -> tuple[SharedState, _Part]:
    """The state comes back with the chunks' tokens in it."""
    request, positions, is_real = _locate(batch)
    pages = batch.page_table[request, positions // _page_size(state)]
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

    last = jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
    part = _Part(
        token_ids=batch.token_ids,
        positions=positions,
        slots=_slots(pages, positions, is_real, _page_size(state)),
        attention=attention,
        last=lambda hidden: hidden[last],
        rows=batch.rows,
        context_lens=batch.context_lens,
        samples=batch.samples,
        sampling=batch.sampling,
    )
    return replace(state, tokens=tokens), part


def _decode_part(state: SharedState, batch: DecodeBatch) -> _Part:
    is_real = batch.context_lens > 0
    positions = jnp.maximum(batch.context_lens - 1, 0)
    row = jnp.arange(batch.rows.shape[0], dtype=jnp.int32)
    pages = batch.page_table[row, positions // _page_size(state)]

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

    return _Part(
        token_ids=state.tokens[batch.rows, positions],
        positions=positions,
        slots=_slots(pages, positions, is_real, _page_size(state)),
        attention=attention,
        last=lambda hidden: hidden,
        rows=batch.rows,
        context_lens=batch.context_lens,
        samples=is_real,
        sampling=batch.sampling,
    )


def _forward(model: Any, state: SharedState, parts: list[_Part]) -> tuple[list[Array], SharedState]:
    """Each part's hidden states [T, D], and the state with the new keys and values."""
    slots = _join([part.slots for part in parts])

    def attend(
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: LayerCache,
        window: int | None,
    ) -> tuple[Float[Array, "T N H"], LayerCache]:
        k_pages, v_pages = kv_write(cache["k_pages"], cache["v_pages"], k, v, slots)
        cache = {"k_pages": k_pages, "v_pages": v_pages}
        queries = zip(parts, _split(q, parts), strict=True)
        return _join([part.attention(own, cache, window) for part, own in queries]), cache

    token_ids = _join([part.token_ids for part in parts])
    positions = _join([part.positions for part in parts])
    hidden, layers = model(token_ids, positions, state.layers, attend)
    return _split(hidden, parts), replace(state, layers=layers)


def _sample(
    model: Any,
    state: SharedState,
    parts: list[_Part],
    hidden: list[Array],
    *,
    may_be_none: bool = False,
) -> tuple[StepOutput, SharedState]:
    """Samples for all parts' rows at once, and writes the tokens. If no row may sample at all, that
    is found out before the logits are computed."""
    rows = _join([part.rows for part in parts])
    context_lens = _join([part.context_lens for part in parts])
    samples = _join([part.samples for part in parts])

    def choose() -> StepOutput:
        last = _join([part.last(own) for part, own in zip(parts, hidden, strict=True)])
        sampling = join_sampling([part.sampling for part in parts])
        return sample(model.logits(last), sampling, state.tokens, rows, context_lens)

    if may_be_none:
        output = lax.cond(jnp.any(samples), choose, lambda: empty_output(rows.shape[0]))
    else:
        output = choose()
    tokens = _put(state.tokens, rows, context_lens, output.token_ids, samples)
    return output, replace(state, tokens=tokens)


def _join(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _split(x: Array, parts: list[_Part]) -> list[Array]:
    """What `_join` joined."""
    if len(parts) == 1:
        return [x]
    ends = np.cumsum([part.token_ids.shape[0] for part in parts])
    return jnp.split(x, ends[:-1])


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


def _page_size(state: SharedState) -> int:
    return state.layers[0]["k_pages"].shape[2]
