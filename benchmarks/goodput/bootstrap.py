"""Confidence intervals from repetitions: percentiles of means over resampled seeds.

With few seeds they are rough, and never wider than the seeds are apart; with two or three they are
exactly that range.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

_RESAMPLES: Final = 4000
_LEVEL: Final = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the mean."""
    resampled = np.array(values)[_draws(len(values))].mean(axis=1)
    return _percentiles(resampled)


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Of the ratio of means. Entry i of both is of the same seed, so seeds are drawn in pairs.

    Infinity where the denominator is 0.
    """
    draws = _draws(len(above))
    top, bottom = (np.array(values)[draws].mean(axis=1) for values in (above, below))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _percentiles(np.where(bottom > 0, top / bottom, np.inf))


def _draws(num: int) -> np.ndarray:
    return np.random.default_rng(0).integers(num, size=(_RESAMPLES, num))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - _LEVEL)
    low, high = np.percentile(values, (tail, 100 - tail), method="nearest").tolist()
    return low, high
