"""Partition and statistics → protobuf."""

from semipd_jax.messages import (
    Choice,
    Partition,
    Percentiles,
    PhaseShares,
    PredictionError,
    RecentRequests,
    Slo,
    Stats,
)
from semipd_server.pb import control_pb2 as pb


def partition_message(partition: Partition) -> pb.Partition:
    choice = partition.choice
    return pb.Partition(
        policy=partition.policy,
        prefill=_phase_shares(partition.prefill),
        decode=_phase_shares(partition.decode),
        slos=[_slo(slo) for slo in partition.slos],
        slo_target=partition.slo_target,
        choice=None if choice is None else _choice(choice),
    )


def stats_message(stats: Stats) -> pb.Stats:
    """The one form in which statistics are shown. As JSON: `google.protobuf.json_format`."""
    return pb.Stats(
        time_s=stats.time_s,
        partition=partition_message(stats.partition),
        requests=pb.Requests(
            running=stats.num_running,
            waiting=stats.num_waiting,
            preemptions=stats.num_preemptions,
            output_tokens=stats.num_output_tokens,
            prefix_cache_queries=stats.prefix_cache_queries,
            prefix_cache_hits=stats.prefix_cache_hits,
        ),
        pages=pb.Pages(**pages_by_state(stats)),
        prefill=_phase_stats(
            stats.num_prefill_steps, stats.num_prefill_restarts, stats.prefill_error
        ),
        decode=_phase_stats(stats.num_decode_steps, stats.num_decode_restarts, stats.decode_error),
        slo=pb.SloCounts(
            ended=stats.slo.num_ended,
            met=stats.slo.num_met,
            ttft_met=stats.slo.num_ttft_met,
            tpot_met=stats.slo.num_tpot_met,
        ),
        recent=_recent(stats.recent),
        num_compiles=stats.num_compiles,
        plan_s_mean=stats.mean_plan_s,
        plan_s_max=stats.max_plan_s,
    )


def pages_by_state(stats: Stats) -> dict[str, int]:
    """used, cached, free, quarantined: they add up to all pages."""
    free, quarantined = stats.num_free_pages, stats.num_quarantined_pages
    return {
        "used": stats.num_pages - free - quarantined,
        "cached": stats.num_idle_cached_pages,
        "free": free - stats.num_idle_cached_pages,
        "quarantined": quarantined,
    }


def _phase_shares(shares: PhaseShares) -> pb.PhaseShares:
    return pb.PhaseShares(
        asked=shares.asked,
        current=shares.current,
        warm=shares.warm,
        num_switches=shares.num_switches,
    )


def _slo(slo: Slo) -> pb.Slo:
    return pb.Slo(ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms, priority=slo.priority)


def _choice(choice: Choice) -> pb.Choice:
    return pb.Choice(
        age_s=choice.age_s,
        phase=choice.phase,
        prefill_share=choice.prefill,
        decode_share=choice.decode,
        reason=choice.reason,
        predicted_prefill_s=choice.predicted_prefill_s,
        predicted_decode_s=choice.predicted_decode_s,
        inputs=choice.inputs,
    )


def _phase_stats(num_steps: int, num_restarts: int, error: PredictionError) -> pb.PhaseStats:
    return pb.PhaseStats(
        steps=num_steps,
        restarts=num_restarts,
        prediction_error_mean=error.total / max(error.count, 1),
        predictions=error.count,
    )


def _recent(recent: RecentRequests) -> pb.RecentRequests:
    return pb.RecentRequests(
        window_s=recent.window_s,
        ended=recent.num_ended,
        met=recent.num_met,
        ttft_s=_percentiles(recent.ttft_s),
        tpot_s=_percentiles(recent.tpot_s),
    )


def _percentiles(values: Percentiles | None) -> pb.Percentiles | None:
    return (
        None if values is None else pb.Percentiles(p50=values.p50, p90=values.p90, p99=values.p99)
    )
