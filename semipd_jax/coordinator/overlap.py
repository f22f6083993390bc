"""For how much of a step's time the other phase ran too, by the coordinator's clock."""

from dataclasses import dataclass

from semipd_jax.messages import OTHER_PHASE, Phase
from semipd_jax.tuner.latency import Conditions


@dataclass(slots=True)
class _Run:
    """A running step.

    Attributes:
      beside_s: seconds for which the other phase ran so far.
      beside_share_s: those seconds, each times the other phase's share.
    """

    share: float
    began_s: float
    beside_s: float = 0.0
    beside_share_s: float = 0.0


class Overlaps:
    """Told when each phase's running step begins and ends, in the order of time."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._runs: dict[Phase, _Run | None] = {"prefill": None, "decode": None}

    def began(self, phase: Phase, share: float, now_s: float) -> None:
        self._advance(now_s)
        self._runs[phase] = _Run(share, now_s)

    def ended(self, phase: Phase, now_s: float) -> Conditions:
        """Under which the phase's running step ran; the other's share is the mean over the time
        that both ran."""
        self._advance(now_s)
        run = self._runs[phase]
        assert run is not None, f"no {phase} step runs"
        self._runs[phase] = None
        if run.beside_s <= 0:
            return Conditions(run.share)
        part = run.beside_s / (now_s - run.began_s)
        return Conditions(run.share, run.beside_share_s / run.beside_s, min(1.0, part))

    def lost(self, phase: Phase, now_s: float) -> None:
        """The phase's running step will not end."""
        self._advance(now_s)
        self._runs[phase] = None

    def _advance(self, now_s: float) -> None:
        elapsed, self._now_s = now_s - self._now_s, now_s
        for phase, run in self._runs.items():
            other = self._runs[OTHER_PHASE[phase]]
            if run is not None and other is not None:
                run.beside_s += elapsed
                run.beside_share_s += elapsed * other.share
