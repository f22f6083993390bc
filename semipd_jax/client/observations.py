"""What an engine client saw of its requests, as counts that only grow.

Every interval has both ends on this process's `time.monotonic`, except those of
`messages.Done.timings`, which have both on the coordinator's. Recording costs a bisection and an
addition; whoever shows the counts reads them whenever it likes.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from semipd_jax.errors import (
    DuplicateRequestError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
)
from semipd_jax.request import FinishReason, Timings

TTFT_BOUNDS_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BOUNDS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""vLLM's bounds, so that dashboards and alerts read the same; tokens also below 10 ms."""

ERROR: Final = "error"
"""Beside the `FinishReason`s: the engine gave the request up."""


class Histogram:
    """How many values lie above `bounds[i - 1]` and not above `bounds[i]`: `counts[i]`."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float | int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class RequestTimes:
    """When one request arrived, and its first and its last token."""

    __slots__ = ("arrival_s", "first_s", "last_s", "num_tokens")

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.first_s = self.last_s = arrival_s
        self.num_tokens = 0


class Observations:
    """Counts of one client's requests, since it began.

    Attributes:
      finished: requests that ended, by `FinishReason` or `ERROR`.
      refused: requests that never ran: "invalid", "overloaded" or "unavailable".
    """

    def __init__(self, max_model_len: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.ttft_s = Histogram(TTFT_BOUNDS_S)
        self.itl_s = Histogram(TOKEN_BOUNDS_S)
        self.tpot_s = Histogram(TOKEN_BOUNDS_S)
        self.e2e_s = Histogram(REQUEST_BOUNDS_S)
        self.queue_s = Histogram(REQUEST_BOUNDS_S)
        self.prefill_s = Histogram(REQUEST_BOUNDS_S)
        self.decode_s = Histogram(REQUEST_BOUNDS_S)
        self.inference_s = Histogram(REQUEST_BOUNDS_S)
        lengths = one_two_five(max_model_len)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_output_tokens = Histogram(lengths)
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.finished: Counter[str] = Counter(dict.fromkeys([*FinishReason, ERROR], 0))
        self.refused: Counter[str] = Counter(dict.fromkeys(_REFUSALS.values(), 0))

    def refusal(self, error: EngineError) -> None:
        self.refused[_REFUSALS.get(type(error), "unavailable")] += 1

    def admitted(self, prompt_len: int) -> None:
        self.num_prompt_tokens += prompt_len

    def token(self, times: RequestTimes, now_s: float) -> None:
        if times.num_tokens == 0:
            times.first_s = now_s
            self.ttft_s.add(now_s - times.arrival_s)
        else:
            self.itl_s.add(now_s - times.last_s)
        times.last_s = now_s
        times.num_tokens += 1
        self.num_output_tokens += 1

    def ended(self, times: RequestTimes, prompt_len: int, reason: str, timings: Timings) -> None:
        """The engine finished the request, or was told to."""
        self.finished[reason] += 1
        self.e2e_s.add(self.clock() - times.arrival_s)
        self.queue_s.add(timings.queue_s)
        self.prefill_s.add(timings.prefill_s)
        self.decode_s.add(timings.decode_s)
        self.inference_s.add(timings.prefill_s + timings.decode_s)
        self.request_prompt_tokens.add(prompt_len)
        self.request_output_tokens.add(times.num_tokens)
        if times.num_tokens > 1:
            self.tpot_s.add((times.last_s - times.first_s) / (times.num_tokens - 1))

    def gave_up(self, reason: str) -> None:
        """The request ended without a word from the engine about its times."""
        self.finished[reason] += 1


_REFUSALS: Final[dict[type[EngineError], str]] = {
    InvalidRequestError: "invalid",
    DuplicateRequestError: "invalid",
    OverloadedError: "overloaded",
    EngineError: "unavailable",
}


def one_two_five(largest: int) -> list[float]:
    """1, 2, 5, 10, 20, … up to `largest`."""
    bounds: list[float] = []
    scale = 1
    while scale <= largest:
        bounds += [float(m * scale) for m in (1, 2, 5) if m * scale <= largest]
        scale *= 10
    return bounds
