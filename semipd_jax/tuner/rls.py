"""Recursive least squares that outliers cannot drag along, and that never forget the prior.

Weighted updates as in Huber's M-estimator: a residual beyond `_CLIP` times the usual one counts
only as far as that. Residuals are relative to the prediction, so steps of 1 ms and of 1 s count
alike.

Samples are forgotten, the prior is not: what no sample excites for hours stays where the profile
put it, instead of wandering with the noise.
"""

from typing import Final

import numpy as np
from jaxtyping import Float64

_CLIP: Final = 3.0
_NOISE_VARIANCE: Final = 0.05**2
_FORGETTING: Final = 0.9995
_KEPT: Final = 0.5
"""Part of what the prior says that is never forgotten."""
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
        self._information = np.diag(uncertainty**-2.0)
        self._vector = self._information @ coefficients
        self._kept_information = _KEPT * self._information
        self._kept_vector = _KEPT * self._vector
        self._spread = _INITIAL_SPREAD

    def update(self, features: Float64[np.ndarray, " k"], measured: float) -> float:
        """Takes in one sample with `measured` > 0.

        Returns:
          (measured - predicted) / predicted, with the prediction before the update.
        """
        predicted = max(float(features @ self.coefficients), 0.01 * measured)
        x, y = features / predicted, measured / predicted
        error = y - 1
        weight = min(1.0, _CLIP * self._spread / abs(error)) if error else 1.0
        self._spread += _SPREAD_RATE * (min(abs(error), _CLIP * self._spread) - self._spread)
        self._spread = max(self._spread, 1e-3)
        weighted = weight / _NOISE_VARIANCE * x
        self._information += (1 - _FORGETTING) * (self._kept_information - self._information)
        self._information += np.outer(weighted, x)
        self._vector += (1 - _FORGETTING) * (self._kept_vector - self._vector) + weighted * y
        self.coefficients = np.maximum(np.linalg.solve(self._information, self._vector), 0.0)
        return error
