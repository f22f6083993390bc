"""The rules of semi-PD's authors' dynamic tuner, which differ from their Algorithm 1.

`DynamicPartitioner.replan` in `distserve/single_stage_engine.py`, branch `distserve_base` of
infinigence/Semi-PD (17bbab4, Apache-2.0): offline curves in 1 / share, no x / (x + y), a guard of
1.1 on TPOT, both shares to 1 when both targets fail. Its curves do not give 1 at a share of 1 and
are forced to; its waiting curve is nearly flat above 0.8. They are kept as they are: this is the
published behaviour, to compare with. It knows one promise, the default. Its index of the 90th
percentile, out of range for windows of ten and fewer, is bounded.
"""

from math import inf
from typing import Final

from semipd_jax.tuner.policy import (
    FULL,
    Decision,
    FinishedRequest,
    Ladder,
    Ladders,
    Observation,
    Shares,
)
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.window import WINDOW_SIZE, Collector, Window

PUBLISHED_LADDER: Final[Ladder] = (0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 1.0)
_TPOT_GUARD: Final = 1.1
_PERCENTILE: Final = 90.0


def tpot_scale(share: float) -> float:
    return 1.0 if share == 1 else 0.6099164272415375 / share + 0.41530605763705736


def latency_scale(share: float) -> float:
    return 1.0 if share == 1 else 0.732435017003385 / share + 0.3185253290850649


def wait_scale(share: float) -> float:
    if share == 1:
        return 1.0
    r = 1 / share
    return 1.4046465674985547 * r**2 - 3.15935463280878 * r + 2.8734660485396604


class Replan:
    """
    Args:
      window_size: finished requests between two decisions.
      max_step: most rungs of one decision.
    """

    def __init__(
        self,
        ladders: Ladders,
        targets: SloTargets,
        *,
        window_size: int = WINDOW_SIZE,
        max_step: int = 3,
        start: Shares = FULL,
    ) -> None:
        self._ladders = ladders
        self._target = targets.default
        self._max_step = max_step
        self._collector = Collector(window_size, SloTargets(targets.default))
        self._decision = Decision(start, "waiting for a window")

    def decide(self, observation: Observation) -> Decision:
        for request in observation.finished:
            self._collector.add(request)
        if (window := self._collector.take(observation.now_s)) is not None:
            before = self._decision.shares
            self._decision = self._replanned(window)
            if self._decision.shares != before:
                self._collector.switched(observation.now_s)
        return self._decision

    def _replanned(self, window: Window) -> Decision:
        shares = self._decision.shares
        tpot_s, worst = window.tpot_s(_PERCENTILE), _late(window)
        ttft_slo = inf if self._target.ttft_ms is None else self._target.ttft_ms / 1e3
        tpot_slo = inf if self._target.tpot_ms is None else self._target.tpot_ms / 1e3

        def ttft(share: float) -> float:
            wait = wait_scale(share) / wait_scale(shares.prefill) * worst.queue_s
            scale = latency_scale(share) / latency_scale(shares.prefill)
            return wait + scale * worst.prefill_s

        def tpot(share: float) -> float:
            return tpot_scale(share) / tpot_scale(shares.decode) * tpot_s

        holds_ttft, holds_tpot = worst.ttft_s <= ttft_slo, tpot_s * _TPOT_GUARD <= tpot_slo
        new, reason = shares, "both targets hold"
        if not holds_ttft and not holds_tpot:
            reason = "both targets fail"
            if shares.prefill < 1 and shares.decode < 1:
                new = Shares(1.0, 1.0)
        elif not holds_tpot:
            reason = "TPOT fails"
            if shares.decode < 1:
                above = self._above(shares.decode, self._ladders.decode)
                wanted = [s for s in above if tpot(s) <= tpot_slo]
                new = Shares(shares.prefill, (wanted or above[-1:])[0])
            else:
                below = self._below(shares.prefill, self._ladders.prefill)
                kept = [s for s in below if ttft(s) <= ttft_slo]
                new = Shares((kept or [shares.prefill])[-1], shares.decode)
        elif not holds_ttft:
            reason = "TTFT fails"
            if shares.prefill < 1:
                above = self._above(shares.prefill, self._ladders.prefill)
                wanted = [s for s in above if ttft(s) <= ttft_slo]
                new = Shares((wanted or above[-1:])[0], shares.decode)
            else:
                below = self._below(shares.decode, self._ladders.decode)
                kept = [s for s in below if tpot(s) <= tpot_slo]
                new = Shares(shares.prefill, (kept or [shares.decode])[-1])
        inputs = (("wait_s", worst.queue_s), ("latency_s", worst.prefill_s), ("tpot_s", tpot_s))
        return Decision(new, reason, ttft(new.prefill), tpot(new.decode), inputs)

    def _above(self, share: float, ladder: Ladder) -> list[float]:
        """The rungs within reach of one decision, nearest first."""
        return [rung for rung in ladder if rung > share][: self._max_step]

    def _below(self, share: float, ladder: Ladder) -> list[float]:
        return [rung for rung in reversed(ladder) if rung < share][: self._max_step]


def _late(window: Window) -> FinishedRequest:
    """The request at the 90th percentile of TTFT."""
    by_ttft = sorted(window.requests, key=lambda r: r.ttft_s)
    return by_ttft[min(int(0.9 * len(by_ttft)) + 1, len(by_ttft) - 1)]
