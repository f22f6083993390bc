"""What a person watches: the engine right now and over the last minutes, as one JSON object.

Nothing is measured here. The coordinator's `Stats` are asked for when somebody looks, at most once
in `_SAMPLE_S` however many do, and kept for a while: rates follow from two of them.
"""

import asyncio
import itertools
from collections import deque
from importlib.metadata import version
from typing import Final

import msgspec

from semipd_jax.client.observations import Observations
from semipd_jax.errors import UnavailableError
from semipd_jax.messages import Percentiles, PhaseShares, Stats
from semipd_server.control_convert import pages_by_state
from semipd_server.gate import Gate

_STATS_TIMEOUT_S: Final = 2.0
_SAMPLE_S: Final = 0.5
_RATE_WINDOW_S: Final = 10.0
_HISTORY: Final = 300  # samples


class Latency(msgspec.Struct, frozen=True):
    """Of requests that ended lately, in milliseconds; None where there is nothing to tell."""

    p50: float | None
    p90: float | None
    p99: float | None
    slo: float | None


class Phase(msgspec.Struct, frozen=True):
    """Shares of one phase: chosen, of its last step, and of its warm workers."""

    asked: float
    current: float | None
    warm: tuple[float, ...]
    switches: int
    restarts: int


class Attainment(msgspec.Struct, frozen=True):
    """Of the `ended` requests of the last `window_s`, `met` met both promises."""

    window_s: float
    ended: int
    met: int
    target: float


class Point(msgspec.Struct, frozen=True):
    """One moment, `age_s` ago."""

    age_s: float
    running: int
    waiting: int
    output_tokens_per_s: float
    prefill: float
    decode: float
    ttft_p90: float | None
    tpot_p90: float | None
    free_pages: int


class Engine(msgspec.Struct, frozen=True):
    """The engine as it serves.

    Attributes:
      rates: per second, over the last seconds.
      pages: KV pages by state.
      counts: since the start.
      cache_hit_rate: share of prompt tokens that were found; None without any.
      history: oldest first.
    """

    policy: str
    reason: str
    prefill: Phase
    decode: Phase
    running: int
    waiting: int
    ttft_ms: Latency
    tpot_ms: Latency
    attainment: Attainment
    rates: dict[str, float]
    pages: dict[str, int]
    counts: dict[str, int]
    cache_hit_rate: float | None
    history: list[Point]


class Live(msgspec.Struct, frozen=True):
    """`problem` says why there is no engine, or what it waits for."""

    version: str
    model: str | None
    problem: str | None
    engine: Engine | None


class _Sample(msgspec.Struct, frozen=True):
    stats: Stats
    ended: int
    prompt_tokens: int


class LiveView:
    """Samples the engine behind the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._version = version("semipd-jax")
        self._samples: deque[_Sample] = deque(maxlen=_HISTORY)
        self._sampled_s = float("-inf")
        self._sampling = asyncio.Lock()

    async def look(self) -> Live:
        """Never raises: what is wrong is in `problem`."""
        try:
            engine = self._gate.engine
            async with self._sampling:
                await self._sample()
        except UnavailableError as error:
            problem = "; ".join((str(error), *self._gate.waiting_for))
            return Live(self._version, None, problem, None)
        reasons = (self._gate.refusal, *self._gate.waiting_for)
        problem = "; ".join(filter(None, reasons)) or None
        return Live(self._version, engine.info.name, problem, _engine(list(self._samples)))

    async def _sample(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._sampled_s < _SAMPLE_S:
            return
        client = self._gate.engine.client
        stats = await client.stats(timeout_s=_STATS_TIMEOUT_S)
        self._sampled_s = now_s
        seen = client.observations
        self._samples.append(_Sample(stats, _ended(seen), seen.num_prompt_tokens))


def _ended(seen: Observations) -> int:
    return sum(seen.finished.values())


def _engine(samples: list[_Sample]) -> Engine:
    stats = samples[-1].stats
    partition, recent = stats.partition, stats.recent
    slo = partition.slos[0]  # of requests whose priority has none of its own
    queries = stats.prefix_cache_queries
    return Engine(
        policy=partition.policy,
        reason=partition.choice.reason if partition.choice is not None else "",
        prefill=_phase(partition.prefill, stats.num_prefill_restarts),
        decode=_phase(partition.decode, stats.num_decode_restarts),
        running=stats.num_running,
        waiting=stats.num_waiting,
        ttft_ms=_latency(recent.ttft_s, slo.ttft_ms),
        tpot_ms=_latency(recent.tpot_s, slo.tpot_ms),
        attainment=Attainment(
            recent.window_s, recent.num_ended, recent.num_met, partition.slo_target
        ),
        rates=_rates(samples),
        pages=pages_by_state(stats),
        counts={
            "preemptions": stats.num_preemptions,
            "compiles_after_warmup": stats.num_compiles,
            "prefill_steps": stats.num_prefill_steps,
            "decode_steps": stats.num_decode_steps,
        },
        cache_hit_rate=stats.prefix_cache_hits / queries if queries else None,
        history=_history(samples),
    )


def _phase(shares: PhaseShares, restarts: int) -> Phase:
    return Phase(shares.asked, shares.current, shares.warm, shares.num_switches, restarts)


def _latency(seconds: Percentiles | None, slo_ms: float | None) -> Latency:
    if seconds is None:
        return Latency(None, None, None, slo_ms)
    return Latency(1e3 * seconds.p50, 1e3 * seconds.p90, 1e3 * seconds.p99, slo_ms)


def _rates(samples: list[_Sample]) -> dict[str, float]:
    """Between the latest sample and the oldest of the last seconds."""
    last = samples[-1]
    since_s = last.stats.time_s - _RATE_WINDOW_S
    first = next(s for s in samples if s.stats.time_s >= since_s)
    elapsed_s = last.stats.time_s - first.stats.time_s
    growth = {
        "requests": last.ended - first.ended,
        "prompt_tokens": last.prompt_tokens - first.prompt_tokens,
        "output_tokens": last.stats.num_output_tokens - first.stats.num_output_tokens,
    }
    return {name: n / elapsed_s if elapsed_s > 0 else 0.0 for name, n in growth.items()}


def _history(samples: list[_Sample]) -> list[Point]:
    now_s = samples[-1].stats.time_s
    points: list[Point] = []
    for before, sample in itertools.pairwise(samples):
        stats, earlier = sample.stats, before.stats
        elapsed_s = stats.time_s - earlier.time_s
        tokens = stats.num_output_tokens - earlier.num_output_tokens
        recent = stats.recent
        points.append(
            Point(
                age_s=now_s - stats.time_s,
                running=stats.num_running,
                waiting=stats.num_waiting,
                output_tokens_per_s=tokens / elapsed_s if elapsed_s > 0 else 0.0,
                prefill=_share(stats.partition.prefill),
                decode=_share(stats.partition.decode),
                ttft_p90=1e3 * recent.ttft_s.p90 if recent.ttft_s is not None else None,
                tpot_p90=1e3 * recent.tpot_s.p90 if recent.tpot_s is not None else None,
                free_pages=stats.num_free_pages,
            )
        )
    return points


def _share(phase: PhaseShares) -> float:
    return phase.asked if phase.current is None else phase.current
