"""Results of load runs as text."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.load import LoadRun
from benchmarks.metrics import Distribution, Slo, latencies, summarise
from semipd_jax.simulator.traces import Clipping, TraceRow


def print_runs(runs: Sequence[LoadRun], slo: Slo) -> None:
    """Latencies over all runs together; rates of each run as minimum, median and maximum."""
    found = latencies(record for run in runs for record in run.records)
    common.print_table(
        ("ms", "mean", "p50", "p90", "p99"),
        [
            _row("TTFT", found.ttft_ms),
            _row("TPOT", found.tpot_ms),
            _row("ITL", found.itl_ms),
            _row("E2E", found.e2e_ms),
        ],
    )
    summaries = [summarise(run.records, slo) for run in runs]
    print(f"\nruns: {len(runs)}, of {summaries[0].num_requests} requests each")
    columns = {
        "requests/s": [s.requests_per_s for s in summaries],
        "output tokens/s": [s.output_tokens_per_s for s in summaries],
        "total tokens/s": [s.total_tokens_per_s for s in summaries],
        "duration s": [s.duration_s for s in summaries],
    }
    if slo != Slo():
        columns["SLO attainment"] = [s.slo_attainment for s in summaries]
    rows = [(name, *common.spread(values)) for name, values in columns.items()]
    common.print_table(("", "min", "median", "max"), rows)
    failures = sum((Counter(s.failures) for s in summaries), Counter[str]())
    counts = (f"{count} {status}" for status, count in failures.items())
    print(f"failures: {', '.join(counts) or 'none'}\n")
    _print_health(runs)


def trace_note(
    path: Path,
    time_scale: float,
    length_scale: float,
    rows: Sequence[TraceRow],
    clipping: Clipping,
) -> str:
    """What was replayed, and what was changed about it."""
    return (
        f"{path.name}: {len(rows)} requests over {max(row.arrival_s for row in rows):.1f} s "
        f"(times x {time_scale:g}, lengths x {length_scale:g}); {clipping.num_requests} of them "
        f"clipped to {clipping.max_len} tokens, {clipping.num_tokens} tokens cut off\n"
    )


def _row(name: str, found: Distribution | None) -> tuple[object, ...]:
    if found is None:
        return (name, "-", "-", "-", "-")
    return (name, found.mean, found.p50, found.p90, found.p99)


def _print_health(runs: Sequence[LoadRun]) -> None:
    """Of the worst run."""
    send = max((h.p99 for run in runs if (h := run.health.send_lag_ms)), default=0.0)
    loop = max((h.p99 for run in runs if (h := run.health.loop_lag_ms)), default=0.0)
    cpu = max(run.health.cpu_share for run in runs)
    print(
        f"generator: requests sent {send:.1f} ms late (p99), event loop {loop:.1f} ms late (p99), "
        f"{cpu:.2f} cores used"
    )
