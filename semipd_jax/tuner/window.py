"""Finished requests, gathered until there are enough to judge by."""

from dataclasses import dataclass

import numpy as np

from semipd_jax.tuner.policy import FinishedRequest


@dataclass(frozen=True, slots=True)
class Window:
    """Requests that finished one after another."""

    requests: tuple[FinishedRequest, ...]

    def ttft_s(self, percentile: float) -> float:
        return float(np.percentile([r.ttft_s for r in self.requests], percentile))

    def tpot_s(self, percentile: float) -> float:
        """0 if no request had a second token."""
        values = [r.tpot_s for r in self.requests if r.tpot_s is not None]
        return float(np.percentile(values, percentile)) if values else 0.0

    @property
    def arrivals_per_s(self) -> float:
        arrivals = [r.arrival_s for r in self.requests]
        span = max(arrivals) - min(arrivals)
        return (len(arrivals) - 1) / span if span > 0 else 0.0


class Collector:
    """Fills one window after another.

    Args:
      size: requests in a window, at least 2.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._requests: list[FinishedRequest] = []

    def add(self, finished: FinishedRequest) -> None:
        self._requests.append(finished)

    def take(self) -> Window | None:
        """A full window, which starts the next one; None if it is not full yet."""
        if len(self._requests) < self._size:
            return None
        window, self._requests = Window(tuple(self._requests)), []
        return window
