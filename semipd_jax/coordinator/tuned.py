"""Shares that a tuner chooses before every step, from what the scheduler is about to send."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Final

import msgspec

from semipd_jax.config import PHASES, Phase, ShareConfig, SharePolicy
from semipd_jax.coordinator.overlap import Overlaps
from semipd_jax.coordinator.shares import ShareControl
from semipd_jax.messages import OTHER_PHASE, Choice, MixedStep, ToWorker
from semipd_jax.scheduler.prefill import in_order
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import SchedulerState, Stage, pages_for
from semipd_jax.tuner.latency import Sample
from semipd_jax.tuner.policy import Decision, FinishedRequest, Observation, Shares
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.tuner import Tuner
from semipd_jax.tuner.work import Work, work_of

type TunerOf = Callable[[SharePolicy, SloTargets, Shares], Tuner | None]
"""Policy, promises, present shares → the tuner, None for "static". Raises ConfigError if the policy
cannot work."""

_LOG_EVERY_S: Final = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _InFlight:
    work: Work
    share: float


@dataclass(frozen=True, slots=True)
class _Decided:
    decision: Decision
    phase: Phase
    now_s: float
    is_alone: bool


class TunedShares(ShareControl[Phase]):
    """
    Args:
      config: the ladder, and the shares to begin with.
      tuner_of: makes the tuner of a policy.
      clock: seconds, the coordinator's.
    """

    def __init__(
        self,
        config: ShareConfig,
        tuner_of: TunerOf,
        scheduler: Scheduler,
        clock: Callable[[], float],
        *,
        policy: SharePolicy = "static",
        targets: SloTargets | None = None,
    ) -> None:
        super().__init__(config, PHASES, targets)
        self._tuner_of = tuner_of
        self._scheduler = scheduler
        self._clock = clock
        self._in_flight: dict[Phase, deque[_InFlight]] = {"prefill": deque(), "decode": deque()}
        self._overlaps = Overlaps()
        self._finished: list[FinishedRequest] = []
        self._since_s = -inf  # when the policy began: it learns from what arrives from then on
        self._latest: _Decided | None = None
        self._decided: dict[Phase, _Decided] = {}  # of the next step
        self._sent = dict(self.configured)  # the share of each phase's latest step
        self._logged_s = -_LOG_EVERY_S
        self._num_unlogged = 0
        self._tuner: Tuner | None = None
        self.set_policy(policy, self.targets)

    def set_policy(self, policy: SharePolicy, targets: SloTargets) -> None:
        # Not what suited the latest step of a policy that goes.
        is_kept = self.policy in ("static", policy)
        asked = self.asked if is_kept else self.configured
        self._tuner = self._tuner_of(policy, targets, Shares(asked["prefill"], asked["decode"]))
        self.asked.update(asked)
        if policy != self.policy:
            self._since_s = self._clock()
        self.policy, self.targets = policy, targets
        self._latest = None
        self._decided.clear()
        self._finished = []
        if self._tuner is not None and self._tuner.refined is not None:
            self.errors = self._tuner.refined.errors

    def choice(self, now_s: float) -> Choice | None:
        if self._latest is None:
            return None
        decision = self._latest.decision
        return Choice(
            age_s=now_s - self._latest.now_s,
            phase=self._latest.phase,
            prefill=decision.shares.prefill,
            decode=decision.shares.decode,
            reason=decision.reason,
            predicted_prefill_s=decision.predicted_prefill_s,
            predicted_decode_s=decision.predicted_decode_s,
            inputs=dict(decision.inputs),
        )

    # ------------------------------------------------------------ before a step

    def wanted(self, phase: Phase, /, *, is_alone: bool) -> float:
        if self._tuner is None:
            return super().wanted(phase, is_alone=is_alone)
        state = self._scheduler.state
        work = upcoming_prefill(state) if phase == "prefill" else upcoming_decode(state)
        if work is None:  # no step will be sent
            return self.asked[phase]
        beside = self._in_flight[OTHER_PHASE[phase]]
        other = None if is_alone or not beside else beside[-1].work
        shares = self.asked | ({OTHER_PHASE[phase]: beside[-1].share} if beside else {})
        decision = self._tuner.decide(
            Observation(
                now_s=self._clock(),
                phase=phase,
                prefill=work if phase == "prefill" else other,
                decode=work if phase == "decode" else other,
                shares=Shares(shares["prefill"], shares["decode"]),
                kv_used=kv_demand(state),
                priorities=self._decoding_priorities(),
                finished=self._finished,
            )
        )
        self._finished = []
        self._latest = _Decided(decision, phase, self._clock(), is_alone)
        self._decided[phase] = self._latest
        self.asked[phase] = decision.shares.of(phase)
        return super().wanted(phase, is_alone=is_alone)

    def _decoding_priorities(self) -> frozenset[int]:
        found: set[int] = set()
        if self.targets.by_class:
            found.update(r.request.priority for r in self._scheduler.state.decoding)
        return frozenset(found or {0})

    def _log(self, decided: _Decided, step_id: int, share: float) -> None:
        """What a step runs at, and why. Changes at the level info once a second at most; all else
        at the level debug."""
        now_s, phase = self._clock(), decided.phase
        is_change = share != self._sent[phase]
        is_due = is_change and now_s - self._logged_s >= _LOG_EVERY_S
        level = logging.INFO if is_due else logging.DEBUG
        if _log.isEnabledFor(level):
            record = {
                "phase": phase,
                "step_id": step_id,
                "from": self._sent[phase],
                "to": share,
                "policy": self.policy,
                "is_alone": decided.is_alone,
                **decided.decision.record(),
                "not_at_info": self._num_unlogged,
            }
            text = msgspec.json.encode(record).decode()
            what = "changes" if is_change else "stays"
            _log.log(level, "share %s: %s", what, text, extra={"fields": record})
        if is_due:
            self._logged_s, self._num_unlogged = now_s, 0
        elif is_change:
            self._num_unlogged += 1

    # ------------------------------------------------------------ after a step

    def step_sent(self, phase: Phase, /, step: ToWorker, share: float) -> None:
        assert not isinstance(step, MixedStep), "a phase's steps are its own"
        steps = self._in_flight[phase]
        steps.append(_InFlight(work_of(step), share))
        if len(steps) == 1:
            self._overlaps.began(phase, share, self._clock())
        if (decided := self._decided.get(phase)) is not None:
            self._log(decided, step.step_id, share)
        self._sent[phase] = share

    def step_done(self, phase: Phase, /, device_s: float) -> None:
        steps, now_s = self._in_flight[phase], self._clock()
        done = steps.popleft()
        conditions = self._overlaps.ended(phase, now_s)
        if steps:
            self._overlaps.began(phase, steps[0].share, now_s)
        if self._tuner is not None and device_s > 0:
            self._tuner.step_done(Sample(done.work, conditions, device_s))

    def steps_lost(self, phase: Phase, /) -> None:
        self._in_flight[phase].clear()
        self._overlaps.lost(phase, self._clock())

    def request_ended(self, request: FinishedRequest) -> None:
        if self._tuner is not None and request.arrival_s >= self._since_s:
            self._finished.append(request)


def kv_demand(state: SchedulerState) -> float:
    """Part of the pages that requests hold, or would if all that wait were admitted; at most 1.

    What waits for pages waits for decode to give them back, however many are free: a long prompt at
    the head of the queue may need more than those.
    """
    left = state.pages.num_available
    for request in state.waiting:
        num_held = state.num_found(request, held=True)
        left -= pages_for(len(request.token_ids) - num_held, state.limits.page_size)
        if left <= 0:
            return 1.0
    return 1 - left / (state.limits.num_pages - 1)


def upcoming_decode(state: SchedulerState) -> Work | None:
    """The next decode step, if nobody has to wait for pages."""
    table = state.table
    rows = table.ready()
    if rows.size == 0:
        return None
    context_tokens = int(table.context_lens[rows].sum())
    return Work("decode", rows.size, rows.size, context_tokens, context_tokens)


def upcoming_prefill(state: SchedulerState) -> Work | None:
    """The next prefill step, if all find room."""
    left = state.limits.max_num_batched_tokens
    rows = tokens = contexts = pairs = 0
    for request in in_order(state):
        waits = request.stage is Stage.WAITING
        start = state.num_found(request) if waits else request.num_scheduled
        num = min(left, len(request.token_ids) - start)
        if num <= 0:
            continue
        rows, tokens, contexts = rows + 1, tokens + num, contexts + start + num
        pairs += num * start + num * (num + 1) // 2
        left -= num
        if left == 0:
            break
    return Work("prefill", rows, tokens, contexts, pairs) if rows else None
