"""What a load test reports, defined once. Pure functions of what the client saw.

TTFT  send → first message with a token
TPOT  (last - first token) / (tokens - 1), per request; undefined for a single token
ITL   gap between two messages with tokens, pooled over all requests
E2E   send → end of the stream
SLO attainment  share of all requests that succeeded and met every target; a failed one is a miss

These are the formulas of vLLM's benchmark. Other tools use the same words for other things.
Latencies and rates count successful requests only. All times are seconds of one clock.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np

OK: Final = "OK"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message: when it came and how many tokens it brought (at least one)."""

    at_s: float
    num_tokens: int


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What the client saw of one request.

    Attributes:
      scheduled_s: when the arrival process wanted it sent.
      sent_s: when it was sent.
      token_ids: what it generated.
      finished_s: when its stream ended, well or not.
      status: OK, or the name of the status it failed with.
    """

    scheduled_s: float
    sent_s: float
    num_prompt_tokens: int
    arrivals: list[Arrival] = field(default_factory=list[Arrival])
    token_ids: list[int] = field(default_factory=list[int])
    finished_s: float = 0.0
    status: str = OK

    @property
    def num_output_tokens(self) -> int:
        return sum(a.num_tokens for a in self.arrivals)


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets in seconds; None asks for nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Distribution:
    """In milliseconds; percentiles interpolate linearly between samples."""

    mean: float
    p50: float
    p90: float
    p99: float
    count: int


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of successful requests; None where nothing was measured."""

    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one run. Rates are per second from the first send to the last end of a stream.

    Attributes:
      failures: number of failed requests by status.
    """

    num_requests: int
    failures: dict[str, int]
    duration_s: float
    latencies: Latencies
    num_prompt_tokens: int
    num_output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    slo_attainment: float


def ttft_s(record: RequestRecord) -> float | None:
    return record.arrivals[0].at_s - record.sent_s if record.arrivals else None


def tpot_s(record: RequestRecord) -> float | None:
    if record.num_output_tokens < 2:
        return None
    span = record.arrivals[-1].at_s - record.arrivals[0].at_s
    return span / (record.num_output_tokens - 1)


def itl_s(record: RequestRecord) -> list[float]:
    return [after.at_s - before.at_s for before, after in pairwise(record.arrivals)]


def e2e_s(record: RequestRecord) -> float:
    return record.finished_s - record.sent_s


def meets(record: RequestRecord, slo: Slo) -> bool:
    """A request without a first token misses; one with a single token has no TPOT to miss."""
    first, per_token = ttft_s(record), tpot_s(record)
    if record.status != OK or first is None:
        return False
    in_time = slo.ttft_s is None or first <= slo.ttft_s
    return in_time and (slo.tpot_s is None or per_token is None or per_token <= slo.tpot_s)


def distribution_ms(seconds: Iterable[float | None]) -> Distribution | None:
    """Of the values that exist; None if there are none."""
    values = np.array([s for s in seconds if s is not None]) * 1e3
    if values.size == 0:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Distribution(float(values.mean()), p50, p90, p99, values.size)


def latencies(records: Iterable[RequestRecord]) -> Latencies:
    served = [r for r in records if r.status == OK]
    return Latencies(
        ttft_ms=distribution_ms(map(ttft_s, served)),
        tpot_ms=distribution_ms(map(tpot_s, served)),
        itl_ms=distribution_ms(gap for r in served for gap in itl_s(r)),
        e2e_ms=distribution_ms(map(e2e_s, served)),
    )


def summarise(records: Sequence[RequestRecord], slo: Slo) -> Summary:
    """Raises ValueError if there are no records."""
    if not records:
        raise ValueError("no requests were recorded")
    served = [r for r in records if r.status == OK]
    duration = max(r.finished_s for r in records) - min(r.sent_s for r in records)
    prompt = sum(r.num_prompt_tokens for r in served)
    output = sum(r.num_output_tokens for r in served)
    return Summary(
        num_requests=len(records),
        failures=dict(Counter(r.status for r in records if r.status != OK)),
        duration_s=duration,
        latencies=latencies(records),
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        requests_per_s=len(served) / duration,
        output_tokens_per_s=output / duration,
        total_tokens_per_s=(prompt + output) / duration,
        slo_attainment=sum(meets(r, slo) for r in records) / len(records),
    )
