"""One run: a load through an engine, until every request has ended or a goal is out of reach."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float64

from semipd_jax.messages import Phase
from semipd_jax.request import Request, SamplingParams
from semipd_jax.simulator.engines import Engine, Finished, Report
from semipd_jax.simulator.misses import Misses
from semipd_jax.simulator.traces import TraceRow
from semipd_jax.simulator.workloads import Prompts, Workload
from semipd_jax.tuner.slo import SloTarget

type Build = Callable[[Report], Engine]

_ROUNDING: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of every request, in the order of arrival; NaN where there is none.

    Attributes:
      tpot_s: NaN for requests with a single token, too.
      duration_s: from the first arrival to the last end.
      shares: (when, share) of each phase's steps that went to another share than the ones before.
    """

    ttft_s: Float64[np.ndarray, " requests"]
    tpot_s: Float64[np.ndarray, " requests"]
    e2e_s: Float64[np.ndarray, " requests"]
    served: Bool[np.ndarray, " requests"]
    duration_s: float
    counters: dict[str, float]
    shares: Mapping[Phase, Sequence[tuple[float, float]]]

    def attainment(self, target: SloTarget) -> float:
        """Share of all requests that were served and met both targets."""
        in_time, paced = self.served.copy(), self.served.copy()
        if target.ttft_ms is not None:
            in_time &= self.ttft_s * 1e3 <= target.ttft_ms
        if target.tpot_ms is not None:
            paced &= np.isnan(self.tpot_s) | (self.tpot_s * 1e3 <= target.tpot_ms)
        return float((in_time & paced).mean())


@dataclass(frozen=True, slots=True)
class Goal:
    """What a run is for: once its attainment is bound to end up below `attainment`, it ends."""

    target: SloTarget
    attainment: float


def run(workload: Workload, build: Build, goal: Goal | None = None) -> Outcome:
    """Simulates the whole load, or as much of it as shows that `goal` is out of reach: what has not
    ended by then counts as not served.

    Raises:
      RuntimeError: requests are left although nothing happens any more.
    """
    rows, prompts = workload.rows, Prompts(workload)
    ended: list[Finished | None] = [None] * len(rows)
    num_left, last_s, now_s = len(rows), 0.0, 0.0
    misses, most_misses = _allowed(rows, goal)

    def report(finished: Finished) -> None:
        nonlocal num_left, last_s
        number = finished.handle
        ended[number] = finished
        num_left -= 1
        last_s = now_s
        ttft_s, tpot_s, _ = _times(rows[number], finished)
        misses.ended(number, ttft_s=ttft_s, tpot_s=tpot_s)

    engine = build(report)
    number = 0
    while num_left and misses.num <= most_misses:
        arrival_s = rows[number].arrival_s if number < len(rows) else math.inf
        now_s = min(arrival_s, engine.next_s)
        if now_s == math.inf:
            raise RuntimeError(f"{num_left} requests are stuck at {last_s:.3f} s")
        misses.pass_to(now_s)
        engine.advance(now_s)
        if now_s == arrival_s:
            row = rows[number]
            sampling = SamplingParams(
                temperature=0.0, seed=0, max_tokens=row.output_len, ignore_eos=True
            )
            engine.submit(
                number,
                Request(request_id="", prompt_token_ids=prompts.of(number, row), sampling=sampling),
            )
            number += 1
    return _outcome(workload, ended, last_s, engine)


def _allowed(rows: Sequence[TraceRow], goal: Goal | None) -> tuple[Misses, float]:
    """How many may miss. Without a goal, all: no target can be missed."""
    if goal is None:
        return Misses(rows, SloTarget()), math.inf
    return Misses(rows, goal.target), (1 - goal.attainment) * len(rows) + _ROUNDING


def _outcome(
    workload: Workload, ended: list[Finished | None], last_s: float, engine: Engine
) -> Outcome:
    times = [_times(row, finished) for row, finished in zip(workload.rows, ended, strict=True)]
    ttft, tpot, e2e = np.array(times, dtype=float).T  # None becomes NaN
    duration_s = last_s - workload.rows[0].arrival_s
    return Outcome(ttft, tpot, e2e, ~np.isnan(ttft), duration_s, engine.counters(), engine.shares)


def _times(row: TraceRow, finished: Finished | None) -> tuple[float, float | None, float]:
    """TTFT, TPOT if there is one, and all of it, in seconds; NaN if the request was not served."""
    if finished is None or finished.timings is None:
        return math.nan, math.nan, math.nan
    t = finished.timings
    ttft_s = t.queue_s + t.prefill_s
    tpot_s = t.decode_s / (row.output_len - 1) if row.output_len > 1 else None
    return ttft_s, tpot_s, ttft_s + t.decode_s
