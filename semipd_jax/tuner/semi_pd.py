"""semi-PD's Algorithm 1 (arXiv 2504.19867, section 5), with what its print leaves open decided.

Once a window of finished requests is full: if one target fails at the percentile, that phase's
share is raised rung by rung until the model predicts that the target holds; a share that is 1
already stays, and the other one is lowered instead. If both fail, or none, nothing changes.

* As printed, the TTFT branch is taken when both fail; the text says that there is "no space for
  adjustment" then, and the text is followed.
* As printed, `step` is never counted and x' is stale in the first test; here it is counted, and x'
  is computed before it is tested.
* TTFT = a1 / (x' - λ) + b1 and TPOT = a2 / y' + b2 with normalised shares x' = x / (x + y). Five
  unknowns do not follow from one operating point per window. The shapes are those of Figure 10
  (Llama3-8B, ShareGPT), scaled to pass through what was observed; λ = r · l_100 (Eq. 3) from the
  window's arrival rate and prefill time.
* TTFT has a pole at x' = λ. A share within `_POLE_MARGIN` of it counts as saturated, and λ as below
  the share at which the window's requests were served.
* window_size, max_step and step_size are not in the paper; the defaults are those of the authors'
  `distserve_base` branch: 400 requests and 3 steps. A step is a rung of the ladder. Where 400
  requests take longer than `_WINDOW_S`, `LEAST_WINDOW` do, so that a quiet hour is not one window.
* Requests that arrived before the shares changed are not counted: they ran under both.
* Requests of a class are judged by what that class was promised, see `Window`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Final

from semipd_jax.tuner.policy import (
    FULL,
    Decision,
    Ladders,
    Observation,
    Shares,
    rung_above,
    rung_below,
)
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.window import WINDOW_SIZE, Collector, Window

_A1: Final = 0.6809
_B1: Final = 0.022
_A2: Final = 0.6284
_B2: Final = 0.3818
_POLE_MARGIN: Final = 0.05
_MOST_LOAD: Final = 0.9
LEAST_WINDOW: Final = 50
_WINDOW_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Eq. 4 through one observed point.

    Attributes:
      ttft_s, tpot_s: observed under `shares`.
      load: λ, as a share of the device.
    """

    shares: Shares
    ttft_s: float
    tpot_s: float
    load: float

    def ttft(self, shares: Shares) -> float:
        return self.ttft_s * self._ttft_shape(shares) / self._ttft_shape(self.shares)

    def tpot(self, shares: Shares) -> float:
        return self.tpot_s * _tpot_shape(shares) / _tpot_shape(self.shares)

    def _ttft_shape(self, shares: Shares) -> float:
        x = shares.prefill / (shares.prefill + shares.decode)
        return _A1 / (x - self.load) + _B1 if x > self.load * (1 + _POLE_MARGIN) else inf


def _tpot_shape(shares: Shares) -> float:
    return _A2 * (shares.prefill + shares.decode) / shares.decode + _B2


def estimate(window: Window, shares: Shares, percentile: float) -> Estimate:
    x = shares.prefill / (shares.prefill + shares.decode)
    prefill_s = sum(r.prefill_s for r in window.requests) / len(window.requests)
    load = min(window.arrivals_per_s * prefill_s * x, _MOST_LOAD * x)
    return Estimate(shares, window.ttft_s(percentile), window.tpot_s(percentile), load)


class SemiPd:
    """
    Args:
      window_size: finished requests between two decisions, at most.
      max_step: most rungs of one decision.
      start: shares until the first window is full.
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
        self._targets = targets
        self._max_step = max_step
        self._collector = Collector(window_size, targets, least=LEAST_WINDOW, after_s=_WINDOW_S)
        self._decision = Decision(start, "waiting for a window")

    def decide(self, observation: Observation) -> Decision:
        for request in observation.finished:
            self._collector.add(request)
        if (window := self._collector.take(observation.now_s)) is not None:
            before = self._decision.shares
            self._decision = self._adjusted(window)
            if self._decision.shares != before:
                self._collector.switched(observation.now_s)
        return self._decision

    def _adjusted(self, window: Window) -> Decision:
        shares, target = self._decision.shares, self._targets.default
        at = estimate(window, shares, 100 * self._targets.attainment)
        inputs = (("ttft_s", at.ttft_s), ("tpot_s", at.tpot_s), ("load", at.load))
        ttft_slo = inf if target.ttft_ms is None else target.ttft_ms / 1e3
        tpot_slo = inf if target.tpot_ms is None else target.tpot_ms / 1e3
        match at.ttft_s > ttft_slo, at.tpot_s > tpot_slo:
            case False, False:
                return Decision(shares, "both targets hold", at.ttft_s, at.tpot_s, inputs)
            case True, True:
                reason = "both targets fail: no space for adjustment"
                return Decision(shares, reason, at.ttft_s, at.tpot_s, inputs)
            case True, False:
                new = self._raised(shares, self._more_prefill, lambda s: at.ttft(s) > ttft_slo)
                return Decision(new, "TTFT fails", at.ttft(new), at.tpot(new), inputs)
            case _:
                new = self._raised(shares, self._more_decode, lambda s: at.tpot(s) > tpot_slo)
                return Decision(new, "TPOT fails", at.ttft(new), at.tpot(new), inputs)

    def _raised(
        self,
        shares: Shares,
        more: Callable[[Shares], Shares],
        fails: Callable[[Shares], bool],
    ) -> Shares:
        for _ in range(self._max_step):
            if not fails(shares):
                break
            shares = more(shares)
        return shares

    def _more_prefill(self, shares: Shares) -> Shares:
        if (higher := rung_above(shares.prefill, self._ladders.prefill)) is not None:
            return Shares(higher, shares.decode)
        lower = rung_below(shares.decode, self._ladders.decode)
        return shares if lower is None else Shares(shares.prefill, lower)

    def _more_decode(self, shares: Shares) -> Shares:
        if (higher := rung_above(shares.decode, self._ladders.decode)) is not None:
            return Shares(shares.prefill, higher)
        lower = rung_below(shares.prefill, self._ladders.prefill)
        return shares if lower is None else Shares(lower, shares.decode)
