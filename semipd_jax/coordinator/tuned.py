"""Shares that a tuner chooses before every step, from what the scheduler is about to send."""

from collections.abc import Callable
from itertools import chain
from typing import Final

import numpy as np

from semipd_jax.config import ShareConfig
from semipd_jax.coordinator.shares import ShareControl
from semipd_jax.messages import Phase
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import SchedulerState
from semipd_jax.tuner.latency import Sample
from semipd_jax.tuner.policy import Decision, FinishedRequest, Observation, Shares
from semipd_jax.tuner.tuner import Tuner
from semipd_jax.tuner.work import Work

_OTHER: Final[dict[Phase, Phase]] = {"prefill": "decode", "decode": "prefill"}


class TunedShares(ShareControl):
    """
    Args:
      config: the ladder, and the shares to begin with.
      clock: seconds, the coordinator's.

    Attributes:
      decision: the latest one.
    """

    def __init__(
        self, config: ShareConfig, tuner: Tuner, scheduler: Scheduler, clock: Callable[[], float]
    ) -> None:
        super().__init__(config)
        self._tuner = tuner
        self._scheduler = scheduler
        self._clock = clock
        self._sent: dict[Phase, Work | None] = {"prefill": None, "decode": None}
        self._finished: list[FinishedRequest] = []
        self.decision: Decision | None = None

    def wanted(self, phase: Phase, *, is_alone: bool) -> float:
        state = self._scheduler.state
        work = upcoming_prefill(state) if phase == "prefill" else upcoming_decode(state)
        if work is None:  # no step will be sent
            return self.asked[phase]
        other = None if is_alone else self._sent[_OTHER[phase]]
        self.decision = self._tuner.decide(
            Observation(
                now_s=self._clock(),
                phase=phase,
                prefill=work if phase == "prefill" else other,
                decode=work if phase == "decode" else other,
                shares=Shares(self.asked["prefill"], self.asked["decode"]),
                kv_used=1 - state.pages.num_available / (state.limits.num_pages - 1),
                finished=self._finished,
            )
        )
        self._finished = []
        self.asked[phase] = self.decision.shares.of(phase)
        return self.asked[phase]

    def step_sent(self, work: Work) -> None:
        self._sent[work.phase] = work

    def step_done(self, sample: Sample) -> None:
        self._tuner.step_done(sample)

    def request_finished(self, request: FinishedRequest) -> None:
        self._finished.append(request)


def upcoming_decode(state: SchedulerState) -> Work | None:
    """The next decode step, if nobody has to wait for pages."""
    table = state.table
    rows = np.flatnonzero(table.active & (table.context_lens <= table.max_context_lens))
    if rows.size == 0:
        return None
    context_tokens = int(table.context_lens[rows].sum())
    return Work("decode", rows.size, rows.size, context_tokens, context_tokens)


def upcoming_prefill(state: SchedulerState) -> Work | None:
    """The next prefill step, if the cache holds nothing of those that wait and all find room."""
    left = state.limits.max_num_batched_tokens
    rows = tokens = contexts = pairs = 0
    for request in chain(state.prefilling, state.waiting):
        start = request.num_scheduled
        num = min(left, len(request.token_ids) - start)
        if num <= 0:
            continue
        rows, tokens, contexts = rows + 1, tokens + num, contexts + start + num
        pairs += num * start + num * (num + 1) // 2
        left -= num
        if left == 0:
            break
    return Work("prefill", rows, tokens, contexts, pairs) if rows else None
