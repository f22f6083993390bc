"""Just enough for decode, the rest to prefill, decided before every step from predicted times.

* Idle rule: a phase that is alone takes the top rung (Bullet, arXiv 2504.19516).
* Both active: among the rungs for which decode's next step is predicted to hold its TPOT target
  with a margin, the pair under which prefill is fastest (MuxWise, arXiv 2504.14489: just enough SMs
  for decode). If none holds it, the pair under which decode is fastest.
* KV pressure: once requests hold most pages, decode's steps are what frees them. Then the pair
  under which decode is fastest while prefill stays within `_PREFILL_SLACK` of its best (Nexus,
  arXiv 2507.06608: 1.3, switched at 70 % of the pages).
* No flapping: shares that still do their job stay unless another pair gains `_LEAST_GAIN`, and a
  pair that slows decode down has to hold the target with `_BAND` to spare. Decode is sped up at
  once.

A step in flight keeps its share, so before a decode step only decode's share is chosen, given the
prefill step that runs.
"""

from collections.abc import Iterable
from typing import Final

from semipd_jax.tuner.latency import LatencyModel, Terms
from semipd_jax.tuner.policy import FULL, Decision, Ladders, Observation, Shares
from semipd_jax.tuner.slo import SloTargets

_MARGIN: Final = 0.9
_PREFILL_SLACK: Final = 1.3
_PRESSURE_BEGINS: Final = 0.7
_PRESSURE_ENDS: Final = 0.6
_LEAST_GAIN: Final = 0.05
_BAND: Final = 0.07


class Predictive:
    """
    Args:
      model: predicts step times; its owner may refine it between decisions.
    """

    def __init__(self, ladders: Ladders, targets: SloTargets, model: LatencyModel) -> None:
        self._ladders = ladders
        self._targets = targets
        self._model = model
        self._presses = False

    def decide(self, observation: Observation) -> Decision:
        kv_used = observation.kv_used
        self._presses = kv_used > (_PRESSURE_ENDS if self._presses else _PRESSURE_BEGINS)
        prefill, decode = observation.prefill, observation.decode
        if prefill is None or decode is None:
            return Decision(FULL, "alone", inputs=(("kv_used", kv_used),))
        budget_s = _MARGIN * self._targets.tightest_tpot_s(observation.priorities)
        pairs = _Pairs(self._model.terms(prefill), self._model.terms(decode), budget_s)
        choice = self._choose(pairs, observation)
        return Decision(
            choice,
            self._reason(pairs, choice),
            pairs.prefill_s(choice),
            pairs.decode_s(choice),
            (
                ("kv_used", kv_used),
                ("budget_s", budget_s),
                ("prefill_tokens", float(prefill.num_tokens)),
                ("prefill_context_tokens", float(prefill.context_tokens)),
                ("prefill_pairs", float(prefill.num_pairs)),
                ("decode_rows", float(decode.num_rows)),
                ("decode_context_tokens", float(decode.context_tokens)),
                ("prefill_share", observation.shares.prefill),
                ("decode_share", observation.shares.decode),
            ),
        )

    def _choose(self, pairs: "_Pairs", observation: Observation) -> Shares:
        """Of the pair, the share of the phase whose step is sent takes effect."""
        now = observation.shares
        prefill = (now.prefill,) if observation.phase == "decode" else self._ladders.prefill
        candidates = [Shares(x, y) for x in prefill for y in self._ladders.decode]
        if self._presses:
            best = pairs.fastest_decode(candidates)
            stays = pairs.prefill_s(now) <= pairs.most_prefill_s(candidates)
            gains = pairs.decode_s(best) < (1 - _LEAST_GAIN) * pairs.decode_s(now)
        else:
            best = pairs.just_enough(candidates, now)
            stays = pairs.decode_s(now) <= pairs.budget_s
            gains = pairs.prefill_s(best) < (1 - _LEAST_GAIN) * pairs.prefill_s(now)
        return now if stays and not gains else best

    def _reason(self, pairs: "_Pairs", choice: Shares) -> str:
        if self._presses:
            return "KV pressure: decode first"
        if pairs.decode_s(choice) > pairs.budget_s:
            return "TPOT out of reach: decode first"
        return "just enough for decode"


class _Pairs:
    """Predicted times of one step of each phase, side by side, under pairs of shares."""

    def __init__(self, prefill: Terms, decode: Terms, budget_s: float) -> None:
        self._prefill = prefill
        self._decode = decode
        self.budget_s = budget_s

    def prefill_s(self, shares: Shares) -> float:
        return self._prefill.at(shares.prefill, shares.decode)

    def decode_s(self, shares: Shares) -> float:
        return self._decode.at(shares.decode, shares.prefill)

    def just_enough(self, candidates: Iterable[Shares], now: Shares) -> Shares:
        """The fastest prefill for which decode is in time; the fastest decode if it never is."""
        timed = [(self.decode_s(c), self.prefill_s(c), c) for c in candidates]
        now_s = self.decode_s(now)
        slower_s = (1 - _BAND) * self.budget_s
        in_time = [t for t in timed if t[0] <= (slower_s if t[0] > now_s else self.budget_s)]
        if in_time:
            return min(in_time, key=lambda t: (t[1], t[0]))[2]
        return min(timed, key=lambda t: (t[0], t[1]))[2]

    def fastest_decode(self, candidates: list[Shares]) -> Shares:
        most = self.most_prefill_s(candidates)
        allowed = [c for c in candidates if self.prefill_s(c) <= most]
        return min(allowed, key=lambda c: (self.decode_s(c), self.prefill_s(c)))

    def most_prefill_s(self, candidates: Iterable[Shares]) -> float:
        return _PREFILL_SLACK * min(map(self.prefill_s, candidates))
