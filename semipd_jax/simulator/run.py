"""One run: a load through an engine, until every request has ended."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from semipd_jax.messages import Phase
from semipd_jax.request import Request, SamplingParams
from semipd_jax.simulator.engines import Engine, Finished, Report
from semipd_jax.simulator.workloads import Prompts, Workload
from semipd_jax.tuner.slo import SloTarget

type Build = Callable[[Report], Engine]


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


def run(workload: Workload, build: Build) -> Outcome:
    """Simulates the whole load.

    Raises:
      RuntimeError: requests are left although nothing happens any more.
    """
    rows, prompts = workload.rows, Prompts(workload)
    ended: list[Finished | None] = [None] * len(rows)
    num_left, last_s, now_s = len(rows), 0.0, 0.0

    def report(finished: Finished) -> None:
        nonlocal num_left, last_s
        ended[finished.handle] = finished
        num_left -= 1
        last_s = now_s

    engine = build(report)
    number = 0
    while num_left:
        arrival_s = rows[number].arrival_s if number < len(rows) else math.inf
        now_s = min(arrival_s, engine.next_s)
        if now_s == math.inf:
            raise RuntimeError(f"{num_left} requests are stuck at {last_s:.3f} s")
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


def _outcome(
    workload: Workload, ended: list[Finished | None], last_s: float, engine: Engine
) -> Outcome:
    num = len(ended)
    ttft, tpot, e2e = (np.full(num, np.nan) for _ in range(3))
    for i, (row, finished) in enumerate(zip(workload.rows, ended, strict=True)):
        if finished is None or finished.timings is None:
            continue
        t = finished.timings
        ttft[i] = t.queue_s + t.prefill_s
        e2e[i] = ttft[i] + t.decode_s
        if row.output_len > 1:
            tpot[i] = t.decode_s / (row.output_len - 1)
    duration_s = last_s - workload.rows[0].arrival_s
    return Outcome(ttft, tpot, e2e, ~np.isnan(ttft), duration_s, engine.counters(), engine.shares)
