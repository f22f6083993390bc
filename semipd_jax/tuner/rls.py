"""Recursive least squares that outliers cannot drag along.

Weighted updates as in Huber's M-estimator: a residual beyond `_CLIP` times the usual one counts
only as far as that. Residuals are relative to the prediction, so steps of 1 ms and of 1 s count
alike.
"""

from typing import Final

import numpy as np
from jaxtyping import Float64

_CLIP: Final = 3.0
_NOISE_VARIANCE: Final = 0.05**2
_FORGETTING: Final = 0.9995
_SPREAD_RATE: Final = 0.02
_INITIAL_SPREAD: Final = 0.1


class RecursiveLeastSquares:
    """Fits y = x · coefficients with coefficients ≥ 0, one sample after another.

    Args:
      coefficients: the prior.
      uncertainty: its standard deviations, in the same units.
    """

    def __init__(
        self, coefficients: Float64[np.ndarray, " k"], uncertainty: Float64[np.ndarray, " k"]
    ) -> None:
        self.coefficients = coefficients.copy()
        self._covariance = np.diag(uncertainty**2)
        self._most_covariance = float(np.trace(self._covariance))
        self._spread = _INITIAL_SPREAD

    def update(self, features: Float64[np.ndarray, " k"], measured: float) -> float:
        """Takes in one sample with `measured` > 0.

        Returns:
          (measured - predicted) / predicted, with the prediction before the update.
        """
        predicted = max(float(features @ self.coefficients), 0.01 * measured)
        x = features / predicted
        error = measured / predicted - 1
        weight = min(1.0, _CLIP * self._spread / abs(error)) if error else 1.0
        self._spread += _SPREAD_RATE * (min(abs(error), _CLIP * self._spread) - self._spread)
        self._spread = max(self._spread, 1e-3)
        direction = self._covariance @ x
        gain = direction / (_NOISE_VARIANCE * _FORGETTING / weight + x @ direction)
        residual = measured / predicted - float(x @ self.coefficients)
        self.coefficients = np.maximum(self.coefficients + gain * residual, 0.0)
        self._covariance = (self._covariance - np.outer(gain, direction)) / _FORGETTING
        # Directions that no sample excites would otherwise grow without bound.
        trace = float(np.trace(self._covariance))
        if trace > self._most_covariance:
            self._covariance *= self._most_covariance / trace
        return error
