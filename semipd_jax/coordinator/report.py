"""What clients are told about the engine when they ask."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from semipd_jax.config import Lane, Phase
from semipd_jax.coordinator.attainment import Attainment
from semipd_jax.coordinator.shares import ShareControl
from semipd_jax.coordinator.workers import LaneWorkers
from semipd_jax.messages import Partition, PhaseShares, PredictionError, Slo, Stats
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.tuner.slo import SloTargets


@dataclass(slots=True)
class PlanTimes:
    """Seconds this process spends on one reply: taking it in, planning the next step, sending."""

    count: int = 0
    total_s: float = 0.0
    max_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total_s += seconds
        self.max_s = max(self.max_s, seconds)


@dataclass(slots=True)
class Counts:
    """
    Attributes:
      num_compiles: worker → programs it compiled after its warm-up.
    """

    num_restarts: Counter[Lane] = field(default_factory=Counter[Lane])
    num_compiles: dict[str, int] = field(default_factory=dict[str, int])
    num_output_tokens: int = 0
    plan_times: PlanTimes = field(default_factory=PlanTimes)
    attainment: Attainment = field(default_factory=Attainment)


def partition_of(
    shares: ShareControl[Any], lanes: Mapping[Lane, LaneWorkers], now_s: float
) -> Partition:
    def of(phase: Phase) -> PhaseShares:
        workers = lanes[_lane_of(phase, lanes)]
        return PhaseShares(
            asked=shares.asked[workers.lane],
            current=workers.share,
            warm=tuple(sorted(workers.shares.values())),
            num_switches=workers.num_switches,
        )

    return Partition(
        policy=shares.policy,
        prefill=of("prefill"),
        decode=of("decode"),
        slos=_slos(shares.targets),
        slo_target=shares.targets.attainment,
        choice=shares.choice(now_s),
    )


def stats_of(
    query_id: int,
    counts: Counts,
    partition: Partition,
    scheduler: Scheduler,
    shares: ShareControl[Any],
    now_s: float,
    *,
    num_compiling: int,
) -> Stats:
    """`num_compiling` requests wait for their grammars, before the queue."""
    state, times = scheduler.state, counts.plan_times
    errors = {p: PredictionError(e.count, e.total) for p, e in shares.errors.items()}
    return Stats(
        query_id=query_id,
        time_s=now_s,
        partition=partition,
        num_running=len(state.requests) - len(state.waiting),
        num_waiting=len(state.waiting) + num_compiling,
        num_pages=state.limits.num_pages - 1,
        num_free_pages=state.pages.num_available,
        num_quarantined_pages=state.num_quarantined_pages,
        num_cached_pages=state.pages.num_sealed,
        num_idle_cached_pages=state.pages.num_unused,
        num_preemptions=scheduler.num_preemptions,
        num_prefill_steps=scheduler.num_steps["prefill"],
        num_decode_steps=scheduler.num_steps["decode"],
        num_prefill_restarts=counts.num_restarts[_lane_of("prefill", shares.asked)],
        num_decode_restarts=counts.num_restarts[_lane_of("decode", shares.asked)],
        num_compiles=sum(counts.num_compiles.values()),
        max_plan_s=times.max_s,
        mean_plan_s=times.total_s / max(times.count, 1),
        prefix_cache_queries=scheduler.prefix_cache_queries,
        prefix_cache_hits=scheduler.prefix_cache_hits,
        num_output_tokens=counts.num_output_tokens,
        slo=counts.attainment.counts(),
        recent=counts.attainment.recent(now_s),
        prefill_error=errors["prefill"],
        decode_error=errors["decode"],
    )


def _lane_of(phase: Phase, lanes: Collection[Lane]) -> Lane:
    """The phase's own, or the only one."""
    return phase if phase in lanes else next(iter(lanes))


def _slos(targets: SloTargets) -> tuple[Slo, ...]:
    default = Slo(targets.default.ttft_ms, targets.default.tpot_ms)
    by_class = sorted(targets.by_class.items())
    return (default, *(Slo(t.ttft_ms, t.tpot_ms, priority) for priority, t in by_class))
