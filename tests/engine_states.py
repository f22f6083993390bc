"""Moments of an engine at work, as its coordinator tells them."""

from typing import Any

from semipd_jax.messages import Choice, Partition, Percentiles, PhaseShares, RecentRequests, Slo

PARTITION = Partition(
    policy="predictive",
    prefill=PhaseShares(asked=0.6, current=0.5, warm=(0.5, 0.75, 1.0), num_switches=3),
    decode=PhaseShares(asked=0.75, current=None, warm=(0.75, 1.0), num_switches=4),
    slos=(Slo(ttft_ms=200.0, tpot_ms=20.0), Slo(ttft_ms=1.0, tpot_ms=1.0, priority=3)),
    slo_target=0.9,
    choice=Choice(0.1, "decode", 0.6, 0.75, "tpot at risk", 0.1, 0.01, {}),
)


def busy(time_s: float, **fields: Any) -> dict[str, Any]:
    """Fields of `Stats`; 7 requests run, 3 wait, TTFT misses its promise at p99, TPOT at p90."""
    return {
        "time_s": time_s,
        "partition": PARTITION,
        "num_running": 7,
        "num_waiting": 3,
        "num_pages": 1000,
        "num_free_pages": 600,
        "num_quarantined_pages": 10,
        "num_idle_cached_pages": 150,
        "num_preemptions": 5,
        "num_prefill_restarts": 1,
        "num_output_tokens": round(100 * time_s),
        "prefix_cache_queries": 400,
        "prefix_cache_hits": 100,
        "recent": RecentRequests(
            60.0, 40, 30, Percentiles(0.05, 0.15, 0.4), Percentiles(0.01, 0.025, 0.0305)
        ),
    } | fields
