"""Scheduler state → step messages, replies → Python numbers. Arrays become bytes here only."""

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
from jaxtyping import Int32

from semipd_jax.messages import (
    DecodeStep,
    History,
    LogitBias,
    PrefillStep,
    StepDone,
    TokenMasks,
)
from semipd_jax.request import MAX_LOGPROBS, TokenLogprob
from semipd_jax.scheduler.state import Bias, Chunk, RequestState, RowTable, ints


def fill_row(table: RowTable, request: RequestState) -> None:
    """Writes what the sampler needs to know of a request into its row."""
    p = request.request.sampling
    table.sampling[request.row] = (
        p.temperature,
        p.top_p,
        p.min_p,
        p.presence_penalty,
        p.frequency_penalty,
        p.repetition_penalty,
        p.top_k,
        p.seed or 0,
        request.num_prompt,
        -1 if p.logprobs is None else p.logprobs,
    )
    table.is_suspect[request.row] = request.is_suspect
    table.has_bias[request.row] = bool(p.logit_bias) or p.min_tokens > 0
    table.is_constrained[request.row] = request.constraint is not None


def prefill_step(step_id: int, chunks: list[Chunk], table: RowTable) -> PrefillStep:
    requests = [c.request for c in chunks]
    rows = np.array([r.row for r in requests], np.int32)
    context_lens = [c.end for c in chunks]
    table_width = max(len(r.page_ids) for r in requests)
    token_ids = [t for c in chunks for t in c.request.token_ids[c.start : c.end]]
    return PrefillStep(
        step_id=step_id,
        token_ids=_int32(token_ids),
        cu_q_lens=_int32([0, *accumulate(c.end - c.start for c in chunks)]),
        context_lens=_int32(context_lens),
        rows=rows.tobytes(),
        samples=np.array([c.samples for c in chunks], np.bool_).tobytes(),
        table_width=table_width,
        page_table=table.page_table[rows, :table_width].tobytes(),
        sampling=table.sampling[rows].tobytes(),
        bias=_logit_bias(table, rows, context_lens),
        masks=_masks(table, rows, [i for i, c in enumerate(chunks) if c.samples]),
        history=tuple(
            History(c.request.row, _int32(c.request.token_ids[: c.start]))
            for c in chunks
            if 0 < c.start == c.request.num_cached
        ),
    )


def decode_step(step_id: int, rows: Int32[np.ndarray, " B"], table: RowTable) -> DecodeStep:
    context_lens = table.context_lens[rows]
    table_width = int(table.num_pages[rows].max())
    return DecodeStep(
        step_id=step_id,
        context_lens=context_lens.tobytes(),
        rows=rows.tobytes(),
        table_width=table_width,
        page_table=table.page_table[rows, :table_width].tobytes(),
        sampling=table.sampling[rows].tobytes(),
        bias=_logit_bias(table, rows, ints(context_lens)),
        masks=_masks(table, rows, range(len(rows))),
    )


def token_ids(reply: StepDone) -> list[int]:
    return ints(np.frombuffer(reply.token_ids, "<i4"))


class Logprobs:
    """A reply's log-probabilities, row by row."""

    def __init__(self, reply: StepDone) -> None:
        given = reply.logprobs
        self._given = given is not None
        if given is not None:
            self._tokens = np.frombuffer(reply.token_ids, "<i4")
            self._sampled = np.frombuffer(given.sampled, "<f4")
            self._ids = np.frombuffer(given.top_ids, "<i4").reshape(-1, MAX_LOGPROBS)
            self._values = np.frombuffer(given.top_logprobs, "<f4").reshape(-1, MAX_LOGPROBS)

    def of(self, i: int, num: int | None) -> TokenLogprob | None:
        """Row i's sampled token with the `num` most likely ones; None if none were asked for."""
        if num is None or not self._given:
            return None
        top = zip(self._ids[i, :num].tolist(), self._values[i, :num].tolist(), strict=True)
        return TokenLogprob(int(self._tokens[i]), float(self._sampled[i]), tuple(top))


def _logit_bias(table: RowTable, rows: np.ndarray, context_lens: list[int]) -> LogitBias | None:
    """Biases of the step's rows; None if no row has any.

    A row that generates its n-th token (counting from 0) with n < min_tokens may not stop.
    """
    biased = ints(table.has_bias[rows].nonzero()[0])
    if not biased:
        return None
    picked: list[tuple[int, Bias]] = []
    for i in biased:
        request = table.requests[int(rows[i])]
        assert request is not None
        num_output = context_lens[i] - request.num_prompt
        may_stop = num_output >= request.request.sampling.min_tokens
        picked.append((i, request.bias if may_stop else request.bias_without_stops))
    width = max(len(bias.token_ids) for _, bias in picked)
    if width == 0:
        return None
    token_ids = np.full((len(rows), width), -1, np.int32)
    values = np.zeros((len(rows), width), np.float32)
    for i, bias in picked:
        token_ids[i, : len(bias.token_ids)] = bias.token_ids
        values[i, : len(bias.values)] = bias.values
    return LogitBias(width=width, token_ids=token_ids.tobytes(), values=values.tobytes())


def _masks(table: RowTable, rows: np.ndarray, sampling: Iterable[int]) -> TokenMasks | None:
    """Masks of the step's constrained rows among the positions that sample; None if there are no
    such."""
    is_constrained = table.is_constrained[rows]
    if not np.count_nonzero(is_constrained):
        return None
    places: list[int] = []
    masks: list[bytes] = []
    for i in sampling:
        if is_constrained[i]:
            request = table.requests[int(rows[i])]
            assert request is not None
            assert request.constraint is not None
            assert request.constraint.mask is not None, "a row was planned without its mask"
            places.append(i)
            masks.append(request.constraint.mask)
    if not masks:
        return None
    return TokenMasks(width=len(masks[0]) // 4, places=_int32(places), words=b"".join(masks))


def _int32(values: list[int]) -> bytes:
    return np.array(values, np.int32).tobytes()
