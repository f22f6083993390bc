"""Which requests got what was promised: counts since the start, and the latest ones."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from semipd_jax.messages import Percentiles, RecentRequests, SloCounts
from semipd_jax.request import FinishReason
from semipd_jax.scheduler.scheduler import Ending
from semipd_jax.tuner.policy import FinishedRequest
from semipd_jax.tuner.slo import SloTarget, SloTargets

WINDOW_S: Final = 60.0
_MAX_TIMES: Final = 1024


@dataclass(slots=True)
class _Second:
    """Requests that ended within a second."""

    began_s: float
    num_ended: int = 0
    num_met: int = 0


class Attainment:
    """Judges each request when it ends, by the targets of that moment."""

    def __init__(self) -> None:
        self._num_ended = self._num_met = self._num_ttft_met = self._num_tpot_met = 0
        self._seconds: deque[_Second] = deque()
        self._times: deque[tuple[float, FinishedRequest]] = deque(maxlen=_MAX_TIMES)

    def add(self, ending: Ending, targets: SloTargets, now_s: float) -> FinishedRequest | None:
        """Takes in a request's end; its times, unless it failed or its client left while it could
        still have been in time."""
        if ending.error is not None:
            self.missed(now_s)
            return None
        times = finished_request(ending)
        target = targets.of(times.priority)
        if ending.reason is FinishReason.ABORT:
            is_missed = self.left(times.ttft_s, target, now_s, tpot_s=times.tpot_s)
            return times if is_missed else None
        self._take(now_s, times, is_met=self._judge(times, target))
        return times

    def left(
        self, ttft_s: float, target: SloTarget, now_s: float, *, tpot_s: float | None = None
    ) -> bool:
        """A client left. Nobody knows how its request would have ended: it counts only if a promise
        was broken by then. Returns whether one was.

        Args:
          ttft_s: to the first token, or to the end if there was none.
        """
        is_missed = not target.is_met(ttft_s=ttft_s, tpot_s=tpot_s)
        if is_missed:
            self.missed(now_s)
        return is_missed

    def missed(self, now_s: float) -> None:
        """A request failed, or was turned away because there was no room for it."""
        self._take(now_s, None, is_met=False)

    def counts(self) -> SloCounts:
        return SloCounts(self._num_ended, self._num_met, self._num_ttft_met, self._num_tpot_met)

    def recent(self, now_s: float) -> RecentRequests:
        """Of the last `WINDOW_S`; percentiles of the latest `_MAX_TIMES` of them at most."""
        self._forget(now_s)
        served = [times for _, times in self._times]
        return RecentRequests(
            WINDOW_S,
            sum(second.num_ended for second in self._seconds),
            sum(second.num_met for second in self._seconds),
            _percentiles([times.ttft_s for times in served]),
            _percentiles([times.tpot_s for times in served if times.tpot_s is not None]),
        )

    def _take(self, now_s: float, times: FinishedRequest | None, *, is_met: bool) -> None:
        self._num_ended += 1
        self._num_met += is_met
        if not self._seconds or self._seconds[-1].began_s <= now_s - 1:
            self._forget(now_s)
            self._seconds.append(_Second(now_s))
        self._seconds[-1].num_ended += 1
        self._seconds[-1].num_met += is_met
        if times is not None:
            self._times.append((now_s, times))

    def _forget(self, now_s: float) -> None:
        while self._seconds and self._seconds[0].began_s < now_s - WINDOW_S:
            self._seconds.popleft()
        while self._times and self._times[0][0] < now_s - WINDOW_S:
            self._times.popleft()

    def _judge(self, times: FinishedRequest, target: SloTarget) -> bool:
        in_time = target.ttft_is_met(times.ttft_s)
        paced = target.tpot_is_met(times.tpot_s)
        self._num_ttft_met += in_time
        self._num_tpot_met += paced
        return in_time and paced


def finished_request(ending: Ending) -> FinishedRequest:
    timings, num_tokens = ending.timings, ending.request.num_output
    return FinishedRequest(
        arrival_s=ending.request.arrival_s,
        queue_s=timings.queue_s,
        prefill_s=timings.prefill_s,
        tpot_s=timings.decode_s / (num_tokens - 1) if num_tokens > 1 else None,
        priority=ending.request.request.priority,
    )


def _percentiles(seconds: Sequence[float]) -> Percentiles | None:
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99)).tolist()
    return Percentiles(p50, p90, p99)
