"""A latency model that every so many steps refine: what an engine learns while it runs."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from semipd_jax.config import PHASES, Phase
from semipd_jax.tuner.latency import LatencyModel, Sample
from semipd_jax.tuner.rls import RecursiveLeastSquares

_PRIOR_UNCERTAINTY: Final = 0.3
_LEAST_UNCERTAINTY_S: Final = 1e-4


@dataclass(slots=True)
class PredictionError:
    """Of the steps of one phase, relative to the prediction."""

    count: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


class RefinedModel:
    """
    Args:
      model: what a profile says; refined in place. Its coefficients now are the prior of the fits.
      refine_every: of so many steps of a phase, one refines the model.

    Attributes:
      errors: of the steps that refined it.
    """

    def __init__(self, model: LatencyModel, *, refine_every: int = 4) -> None:
        self.model = model
        self.errors: dict[Phase, PredictionError] = {p: PredictionError() for p in PHASES}
        self._refine_every = refine_every
        self._num_steps: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._fits: dict[Phase, RecursiveLeastSquares] = {}
        for phase in PHASES:
            prior = model.get(phase)
            spread = np.maximum(_PRIOR_UNCERTAINTY * prior, _LEAST_UNCERTAINTY_S)
            self._fits[phase] = RecursiveLeastSquares(prior, spread)

    def step_done(self, sample: Sample) -> None:
        """Takes in how long a step really took."""
        phase = sample.work.phase
        self._num_steps[phase] += 1
        if self._num_steps[phase] % self._refine_every:
            return
        fit, features = self._fits[phase], self.model.features(sample.work, sample.conditions)
        error = self.errors[phase]
        error.total += abs(fit.update(features, sample.seconds))
        error.count += 1
        self.model.set(phase, fit.coefficients)
