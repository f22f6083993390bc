"""Step times from a latency profile, for devices that were measured."""

from dataclasses import replace

from semipd_jax.runtime.buckets import mixed_rows
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
        if len(load.works) == 1:
            return self._alone_s(load.works[0], share)
        *saved, _ = sorted(self._model.least(w.phase).at(share, 0.0) for w in load.works)
        return sum(self._alone_s(self._fused(w), share) for w in load.works) - sum(saved)

    def _alone_s(self, work: Work, share: float) -> float:
        return self._model.terms(work).at(share, 0.0)

    def _fused(self, work: Work) -> Work:
        """With as many rows as mixed steps are padded to."""
        sizes = self._model.padding.get("decode", ())
        if work.phase == "prefill" or not sizes:
            return work
        padded = next((n for n in mixed_rows(sizes[-1]) if n >= work.num_rows), work.num_rows)
        return replace(work, num_rows=padded)

    def together_s(self, a: Load, share_a: float, b: Load, share_b: float) -> tuple[float, float]:
        (work_a,), (work_b,) = a.works, b.works
        return (
            self._model.terms(work_a).at(share_a, share_b),
            self._model.terms(work_b).at(share_b, share_a),
        )
