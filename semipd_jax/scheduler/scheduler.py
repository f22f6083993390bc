"""The one place that acts: applies plans to the state, makes steps of them, takes in their replies.

Host only and free of I/O: the coordinator feeds it and sends what it returns. Steps may be answered
in any order between lanes; within a lane they are answered in the order they were sent.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from semipd_jax.messages import DecodeStep, MixedStep, Phase, PrefillStep, StepDone
from semipd_jax.paging.keys import PageKeys
from semipd_jax.request import FinishReason, Request, Timings, TokenLogprob
from semipd_jax.scheduler import watermark, wire
from semipd_jax.scheduler.admission import refusal
from semipd_jax.scheduler.decode import plan_decode
from semipd_jax.scheduler.order import rank
from semipd_jax.scheduler.prefill import plan_prefill
from semipd_jax.scheduler.state import (
    MAX_CRASHES,
    SCRATCH_ROW,
    Bias,
    Chunk,
    Constraint,
    Limits,
    RequestState,
    SchedulerState,
    Stage,
    StepInFlight,
    ints,
    pages_for,
)


@dataclass(slots=True)
class Token:
    """One new token of a request. Not frozen: that would double the cost of making one."""

    request: RequestState
    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Ending:
    """A request is gone. `error` is set when the engine gave up on it."""

    request: RequestState
    reason: FinishReason
    timings: Timings
    stop_token_id: int | None = None
    error: str | None = None


@dataclass(slots=True)
class Result:
    """What a reply or an abort brought, for clients.

    Attributes:
      unmasked: those of the tokens after which a constrained request needs its next mask: see
        `Scheduler.mask_made`.
    """

    tokens: list[Token] = field(default_factory=list[Token])
    endings: list[Ending] = field(default_factory=list[Ending])
    unmasked: list[Token] = field(default_factory=list[Token])


@dataclass(frozen=True, slots=True)
class Sent[Step: (PrefillStep, DecodeStep, MixedStep)]:
    """A step to send, and the requests that were admitted with it."""

    step: Step
    admitted: list[RequestState]


class Scheduler:
    """
    Attributes:
      num_steps: answered steps that did some of each phase.
      prefix_cache_queries, prefix_cache_hits: prompt tokens of admitted requests, and those of them
        whose KV was there. What preempted requests find again is not counted.
    """

    def __init__(self, limits: Limits) -> None:
        self.state = SchedulerState(limits)
        self.num_steps: dict[Phase, int] = {"prefill": 0, "decode": 0}
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._next_step_id = 1
        self._num_submitted = 0
        self._num_admitted = 0

    # ------------------------------------------------------------ requests come and go

    def submit(
        self,
        client: str,
        handle: int,
        request: Request,
        *,
        now_s: float,
        constraint: Constraint | None = None,
    ) -> str | None:
        """Queues a complete request (see `messages.Submit`), or returns why it is refused.

        `constraint` has the mask of the first token.
        """
        state = self.state
        prompt, sampling = request.prompt_token_ids, request.sampling
        room = state.limits.max_model_len - len(prompt)
        stop_ids = frozenset(sampling.stop_token_ids)
        biases = dict(sampling.logit_bias)
        new = RequestState(
            client=client,
            handle=handle,
            number=self._num_submitted,
            request=request,
            arrival_s=now_s,
            token_ids=list(prompt),
            max_len=len(prompt) + min(room, sampling.max_tokens or room),
            stop_ids=stop_ids,
            bias=Bias.of(biases),
            bias_without_stops=Bias.of(biases | dict.fromkeys(stop_ids, -math.inf)),
            page_keys=PageKeys(state.limits.page_size, request.cache_salt),
            constraint=constraint,
        )
        if (reason := refusal(new, state)) is not None:
            return reason
        self._num_submitted += 1
        state.requests[client, handle] = new
        self._enqueue(new)
        return None

    def abort(
        self,
        client: str,
        handle: int,
        reason: FinishReason,
        *,
        now_s: float,
        error: str | None = None,
    ) -> Result:
        """Ends a request at once, for `error` if the engine gives up on it; unknown ones (already
        finished) are ignored."""
        request = self.state.requests.get((client, handle))
        if request is None:
            return Result()
        return Result(endings=[self._end(request, reason, now_s=now_s, error=error)])

    def abort_client(self, client: str, *, now_s: float) -> Result:
        """Ends everything that a vanished client asked for."""
        requests = [r for r in self.state.requests.values() if r.client == client]
        return Result(endings=[self._end(r, FinishReason.ABORT, now_s=now_s) for r in requests])

    # ------------------------------------------------------------ plans become steps

    def next_prefill(
        self, *, now_s: float, max_tokens: int | None = None, joins: int | None = None
    ) -> Sent[PrefillStep] | None:
        """Plans, applies and returns the next prefill step, or None if there is none to run.

        Args:
          max_tokens: the chunk budget of this step, if it is not that of the limits.
          joins: id of the decode step, planned last, that runs and is answered as one with this.
        """
        chunks = plan_prefill(self.state, max_tokens=max_tokens)
        if not chunks:
            return None
        admitted = [c for c in chunks if c.request.stage is Stage.WAITING]
        for chunk in admitted:  # all before any page is taken: that may give up a cached one
            self._admit(chunk, now_s=now_s)
        step_id = self._send([c.request for c in chunks], chunks=chunks, joins=joins)
        for chunk in chunks:
            request = chunk.request
            self._grow(request, pages_for(chunk.end, self.state.limits.page_size))
            request.num_scheduled = chunk.end
            request.steps.add(step_id)
        step = wire.prefill_step(step_id, chunks, self.state.table)
        return Sent(step, [c.request for c in admitted])

    def next_decode(self) -> Sent[DecodeStep] | None:
        """Plans, applies and returns the next decode step, or None if no row can advance."""
        plan = plan_decode(self.state)
        if plan is None:
            return None
        state, table = self.state, self.state.table
        state.growth_share = watermark.share_after_step(state.growth_share)
        if plan.victims:
            state.growth_share = watermark.share_after_preemption(state.growth_share)
        for victim in plan.victims:
            self._preempt(victim)
        if plan.rows.size == 0:
            return None
        for row in plan.grow:
            request = table.requests[row]
            assert request is not None
            self._grow(request, len(request.page_ids) + 1)
        requests = [r for row in ints(plan.rows) if (r := table.requests[row]) is not None]
        full = table.context_lens[plan.rows] % state.limits.page_size == 0
        step_id = self._send(requests, filling=ints(full.nonzero()[0]))
        for request in requests:
            request.num_scheduled += 1
            request.steps.add(step_id)
        step = wire.decode_step(step_id, plan.rows, table)
        table.context_lens[plan.rows] += 1
        table.awaits_mask[plan.rows] = table.is_constrained[plan.rows]
        return Sent(step, [])

    # ------------------------------------------------------------ replies

    def step_done(self, reply: StepDone, *, now_s: float) -> Result:
        """Takes in a reply. Rows whose request left the step meanwhile are ignored."""
        step = self.state.in_flight.pop(reply.step_id)
        self._seal_pages(step)
        result = Result()
        token_ids = wire.token_ids(reply)
        logprobs = wire.Logprobs(reply)
        self.num_steps["prefill"] += bool(step.chunks)
        self.num_steps["decode"] += len(step.requests) > len(step.chunks)
        for i, (request, token, chunk) in enumerate(
            zip(step.requests, token_ids, step.chunk_of_row, strict=True)
        ):
            if reply.step_id not in request.steps:
                continue
            request.steps.discard(reply.step_id)
            if request.num_crashes:
                self._set_crashes(request, 0)
            if chunk is None or chunk.samples:
                logprob = logprobs.of(i, request.request.sampling.logprobs)
                result.tokens.append(Token(request, token, logprob))
                self._take_token(request, token, result, now_s=now_s)
        self._release_quarantine(reply.step_id)
        return result

    def mask_made(
        self, request: RequestState, mask: bytes | None, *, now_s: float, error: str | None = None
    ) -> Result:
        """The mask for the next token of a constrained request. If it is None, none may follow: the
        output is complete, or `error` says why it cannot go on."""
        if request.stage is Stage.GONE:
            return Result()
        if mask is None:
            reason = FinishReason.STOP if error is None else FinishReason.ABORT
            return Result(endings=[self._end(request, reason, now_s=now_s, error=error)])
        assert request.constraint is not None
        request.constraint.mask = mask
        self.state.table.awaits_mask[request.row] = False
        return Result()

    def worker_lost(self, step_ids: list[int], *, now_s: float, is_to_blame: bool = True) -> Result:
        """Takes back the steps (oldest first) of a worker that is gone: they are planned again.

        What they wrote does no harm, the same tokens go to the same places. If the worker is to
        blame, a crash is counted against the requests of the step that was running. One crash
        before they would be given up, they run one by one, so that only the one to blame is.
        """
        oldest = self.state.in_flight[step_ids[0]].requests if step_ids and is_to_blame else []
        running = [request for request in oldest if step_ids[0] in request.steps]
        for step_id in reversed(step_ids):
            self._take_back(self.state.in_flight.pop(step_id))
            self._release_quarantine(step_id)
        result = Result()
        for request in running:
            self._set_crashes(request, request.num_crashes + 1)
            if request.num_crashes >= MAX_CRASHES:
                error = f"a worker died {MAX_CRASHES} times while running this request"
                reason = FinishReason.ABORT
                result.endings.append(self._end(request, reason, now_s=now_s, error=error))
        return result

    # ------------------------------------------------------------ changes of the state

    def _enqueue(self, request: RequestState) -> None:
        state = self.state
        request.found_pages = state.cached_pages(request)
        num_found = len(request.found_pages) * state.limits.page_size
        num_to_compute = len(request.token_ids) - num_found
        state.enqueue(request, rank(request, num_to_compute, state.limits))

    def _admit(self, chunk: Chunk, *, now_s: float) -> None:
        state, request = self.state, chunk.request
        assert state.waiting[0] is request, "admission is in order"
        state.dequeue(request)
        request.found_pages = []
        request.row = state.free_rows.pop()
        request.stage = Stage.PREFILLING
        request.admitted_at = self._num_admitted
        self._num_admitted += 1
        if request.admitted_s is None:
            request.admitted_s = now_s
            if state.limits.enable_prefix_caching:
                self.prefix_cache_queries += request.num_prompt
                self.prefix_cache_hits += chunk.start
        state.prefilling.append(request)
        state.table.requests[request.row] = request
        wire.fill_row(state.table, request)
        state.pages.reference(chunk.cached_pages)
        self._add_pages(request, chunk.cached_pages)
        num_shared = state.table.num_shared_pages
        np.maximum(num_shared, state.table.num_common(chunk.cached_pages), out=num_shared)
        request.num_sealed = len(chunk.cached_pages)
        request.num_cached = request.num_scheduled = chunk.start

    def _grow(self, request: RequestState, num_pages: int) -> None:
        if num_pages <= len(request.page_ids):
            return
        pages = self.state.pages.allocate(num_pages - len(request.page_ids))
        assert pages is not None, "a plan named more pages than are available"
        self._add_pages(request, pages)

    def _add_pages(self, request: RequestState, pages: list[int]) -> None:
        table, held = self.state.table, len(request.page_ids)
        request.page_ids += pages
        table.page_table[request.row, held : held + len(pages)] = pages
        table.num_pages[request.row] = held + len(pages)

    def _send(
        self,
        requests: list[RequestState],
        *,
        chunks: list[Chunk] | None = None,
        filling: list[int] | None = None,
        joins: int | None = None,
    ) -> int:
        """The id of a new step in flight, or of the one that these chunks join."""
        if joins is not None:
            step = self.state.in_flight[joins]
            step.requests.extend(requests)
            step.chunks.extend(chunks or [])
            return joins
        step_id = self._next_step_id
        self._next_step_id += 1
        self.state.in_flight[step_id] = StepInFlight(step_id, requests, chunks or [], filling or [])
        return step_id

    def _seal_pages(self, step: StepInFlight) -> None:
        """Seals the pages that a step filled: it was answered, so their KV is there for all."""
        if not self.state.limits.enable_prefix_caching:
            return
        for chunk in step.chunks:
            if step.step_id in chunk.request.steps:
                self._seal_up_to(chunk.request, chunk.end)
        for i in step.filling:
            request = step.requests[i]
            if step.step_id in request.steps:
                self._seal_up_to(request, len(request.token_ids))

    def _seal_up_to(self, request: RequestState, num_tokens: int) -> None:
        num_full = num_tokens // self.state.limits.page_size
        self._seal(request, range(request.num_sealed, num_full))
        request.num_sealed = max(request.num_sealed, num_full)

    def _seal(self, request: RequestState, pages: range) -> None:
        for i in pages:
            self.state.pages.seal(request.page_ids[i], request.page_keys.of(i, request.token_ids))

    def _set_crashes(self, request: RequestState, num_crashes: int) -> None:
        request.num_crashes = num_crashes
        self.state.table.is_suspect[request.row] = request.is_suspect

    def _take_back(self, step: StepInFlight) -> None:
        for request, chunk in zip(step.requests, step.chunk_of_row, strict=True):
            if step.step_id not in request.steps:
                continue
            request.steps.discard(step.step_id)
            if chunk is None:
                request.num_scheduled -= 1
                self.state.table.context_lens[request.row] -= 1
                self.state.table.awaits_mask[request.row] = False
            else:
                request.num_scheduled = chunk.start

    def _take_token(
        self, request: RequestState, token: int, result: Result, *, now_s: float
    ) -> None:
        request.token_ids.append(token)
        if request.first_token_s is None:
            request.first_token_s = now_s
        if token in request.stop_ids:
            reason = FinishReason.STOP
            result.endings.append(self._end(request, reason, now_s=now_s, stop_token_id=token))
        elif len(request.token_ids) >= request.max_len:
            result.endings.append(self._end(request, FinishReason.LENGTH, now_s=now_s))
        else:
            if request.constraint is not None:
                request.constraint.mask = None
                result.unmasked.append(result.tokens[-1])
            if request.stage is Stage.PREFILLING:
                self._hand_off(request)

    def _hand_off(self, request: RequestState) -> None:
        """Prefill → decode: nothing moves, the row becomes active."""
        self.state.prefilling.remove(request)
        request.stage = Stage.DECODING
        table = self.state.table
        table.context_lens[request.row] = len(request.token_ids)
        table.max_context_lens[request.row] = request.max_len - 1
        table.active[request.row] = True
        table.awaits_mask[request.row] = request.lacks_mask

    def _preempt(self, request: RequestState) -> None:
        """Back to its place in the queue. All tokens are kept; of its KV, what is sealed will be
        found again unless the space was needed."""
        self._leave_row(request)
        request.stage = Stage.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(request)

    def _end(
        self,
        request: RequestState,
        reason: FinishReason,
        *,
        now_s: float,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> Ending:
        if request.stage is Stage.WAITING:
            self.state.dequeue(request)
        else:
            self._leave_row(request)
        request.stage = Stage.GONE
        del self.state.requests[request.client, request.handle]
        return Ending(request, reason, _timings(request, now_s), stop_token_id, error)

    def _leave_row(self, request: RequestState) -> None:
        """Seals its full pages once more: others may have had their keys, and be gone."""
        state = self.state
        self._seal(request, range(request.num_sealed))
        if request.stage is Stage.PREFILLING:
            state.prefilling.remove(request)
        state.table.clear(request.row)
        if request.steps:
            state.quarantine.hold(request.page_ids, request.row, request.steps)
        else:
            state.pages.release(request.page_ids)
            state.free_rows.append(request.row)
        request.page_ids = []
        request.row = SCRATCH_ROW
        request.steps = set()
        request.num_scheduled = request.num_sealed = 0

    def _release_quarantine(self, step_id: int) -> None:
        for page_ids, row in self.state.quarantine.step_done(step_id):
            self.state.pages.release(page_ids)
            self.state.free_rows.append(row)


def _timings(request: RequestState, now_s: float) -> Timings:
    admitted = request.admitted_s if request.admitted_s is not None else now_s
    first = request.first_token_s if request.first_token_s is not None else now_s
    return Timings(
        queue_s=admitted - request.arrival_s,
        prefill_s=first - admitted,
        decode_s=now_s - first,
        num_preemptions=request.num_preemptions,
    )
