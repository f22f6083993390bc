"""Finished requests, gathered until there are enough to judge by."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Final

import numpy as np

from semipd_jax.tuner.policy import FinishedRequest
from semipd_jax.tuner.slo import SloTarget, SloTargets

WINDOW_SIZE: Final = 400
"""Finished requests between two decisions in the `distserve_base` branch of semi-PD's authors."""


@dataclass(frozen=True, slots=True)
class Window:
    """Requests that finished one after another.

    Percentiles are of times as if all had the default's promises: a request that was promised
    twice the time counts with half of what it took, one that was promised none does not count.
    """

    requests: tuple[FinishedRequest, ...]
    targets: SloTargets

    def ttft_s(self, percentile: float) -> float:
        """0 if nobody was promised one."""
        default = self.targets.default.ttft_ms
        return _percentile(
            [r.ttft_s * _scale(default, own.ttft_ms) for r, own in self._promised() if own.ttft_ms],
            percentile,
        )

    def tpot_s(self, percentile: float) -> float:
        """0 if nobody who was promised one had a second token."""
        default = self.targets.default.tpot_ms
        return _percentile(
            [
                r.tpot_s * _scale(default, own.tpot_ms)
                for r, own in self._promised()
                if own.tpot_ms and r.tpot_s is not None
            ],
            percentile,
        )

    def _promised(self) -> Iterator[tuple[FinishedRequest, SloTarget]]:
        return ((r, self.targets.of(r.priority)) for r in self.requests)

    @property
    def arrivals_per_s(self) -> float:
        arrivals = [r.arrival_s for r in self.requests]
        span = max(arrivals) - min(arrivals)
        return (len(arrivals) - 1) / span if span > 0 else 0.0


def _scale(default_ms: float | None, own_ms: float) -> float:
    return 1.0 if default_ms is None else default_ms / own_ms


def _percentile(values: list[float], percentile: float) -> float:
    return float(np.percentile(values, percentile)) if values else 0.0


class Collector:
    """Fills one window after another.

    Args:
      size: requests in a window, at least 2.
      least, after_s: a window that has been open for so long is full with so many.
    """

    def __init__(
        self, size: int, targets: SloTargets, *, least: int = 2, after_s: float = inf
    ) -> None:
        self._size = size
        self._targets = targets
        self._least = min(least, size)
        self._after_s = after_s
        self._since_s = -inf
        self._latest_s = -inf  # arrival
        self._opened_s: float | None = None
        self._requests: list[FinishedRequest] = []

    def add(self, finished: FinishedRequest) -> None:
        """Of requests that arrived under shares that no longer hold, nothing follows; nor of those
        before a pause as long as a window."""
        if finished.arrival_s < self._since_s:
            return
        if finished.arrival_s - self._latest_s > self._after_s:
            self._requests, self._opened_s = [], None
        self._latest_s = max(self._latest_s, finished.arrival_s)
        self._requests.append(finished)

    def take(self, now_s: float) -> Window | None:
        """A full window, which starts the next one; None if it is not full yet."""
        if self._opened_s is None:
            self._opened_s = now_s
        least = self._least if now_s - self._opened_s >= self._after_s else self._size
        if len(self._requests) < least:
            return None
        window = Window(tuple(self._requests), self._targets)
        self._requests, self._opened_s = [], now_s
        return window

    def switched(self, now_s: float) -> None:
        """Shares are about to change: only what arrives from now on counts."""
        self._since_s = self._opened_s = now_s
        self._requests = []
