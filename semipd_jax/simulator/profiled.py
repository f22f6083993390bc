"""Step times from a latency profile, for devices that were measured."""

from semipd_jax.simulator.machine import Load
from semipd_jax.tuner.latency import LatencyModel
from semipd_jax.tuner.work import Work


class Profiled:
    def __init__(self, model: LatencyModel) -> None:
        self._model = model

    def load(self, works: tuple[Work, ...]) -> Load:
        return Load(works)

    def alone_s(self, load: Load, share: float) -> float:
        """What every step takes, however small, a fused one takes once: as its dearest part."""
        empty = [Work(work.phase, 0, 0, 0, 0) for work in load.works]
        *saved, _ = sorted(self._alone_s(work, share) for work in empty)
        return sum(self._alone_s(work, share) for work in load.works) - sum(saved)

    def _alone_s(self, work: Work, share: float) -> float:
        return self._model.terms(work).at(share, 0.0)

    def together_s(self, a: Load, share_a: float, b: Load, share_b: float) -> tuple[float, float]:
        (work_a,), (work_b,) = a.works, b.works
        return (
            self._model.terms(work_a).at(share_a, share_b),
            self._model.terms(work_b).at(share_b, share_a),
        )
