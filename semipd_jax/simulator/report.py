"""Results as tables for people and as JSON for programs. Both say if the times were modelled."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np

from semipd_jax.simulator.platform import Platform
from semipd_jax.simulator.run import Outcome
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner.slo import SloTargets

type Origin = Literal["modelled", "simulated", "measured"]

ORIGINS: Final[Mapping[str, str]] = {
    "modelled": "MODELLED, not measured",
    "simulated": "SIMULATED from measured step times",
    "measured": "Measured",
}
_PERCENTILES: Final = (50, 90, 99)


def summary(outcome: Outcome, targets: SloTargets) -> dict[str, Any]:
    """Milliseconds, of requests that were served; None where there are none."""
    served = outcome.served
    return {
        "num_requests": len(served),
        "num_failed": int((~served).sum()),
        "attainment": outcome.attainment(targets.default),
        "ttft_ms": _percentiles(outcome.ttft_s),
        "tpot_ms": _percentiles(outcome.tpot_s),
        "e2e_ms": _percentiles(outcome.e2e_s),
        "duration_s": outcome.duration_s,
        "counters": outcome.counters,
    }


def header(
    workload: Workload,
    targets: SloTargets,
    *,
    origin: Origin,
    platform: str,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What the numbers below it are of."""
    inputs = [row.input_len for row in workload.rows]
    outputs = [row.output_len for row in workload.rows]
    return {
        "origin": origin,
        "platform": platform,
        "notes": list(notes),
        "workload": workload.name,
        "num_requests": len(workload.rows),
        "num_segments": workload.num_segments,
        "mean_input_tokens": sum(inputs) / len(inputs),
        "mean_output_tokens": sum(outputs) / len(outputs),
        "slo": {
            "ttft_ms": targets.default.ttft_ms,
            "tpot_ms": targets.default.tpot_ms,
            "attainment": targets.attainment,
        },
    }


def simulated(platform: Platform, workload: Workload, targets: SloTargets) -> dict[str, Any]:
    """The header of a simulation's results."""
    origin = "modelled" if platform.source == "modelled" else "simulated"
    about = (workload, targets)
    return header(*about, origin=origin, platform=platform.name, notes=platform.notes)


def heading(head: Mapping[str, Any]) -> str:
    slo = head["slo"]
    limits = [
        f"{name} ≤ {slo[key]:.0f} ms"
        for name, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"))
        if slo[key] is not None
    ]
    segments = head.get("num_segments", 1)
    flips = f" in {segments} segments of unlike lengths" if segments > 1 else ""
    tokens = f"{head['mean_input_tokens']:.0f} + {head['mean_output_tokens']:.0f} tokens on average"
    return (
        f"{ORIGINS[head['origin']]}: {head['platform']}\n"
        f"{head['workload']}: {head['num_requests']} requests{flips}, {tokens}; "
        f"{' and '.join(limits) or 'no targets'} for {slo['attainment']:.0%}"
    )


def run_row(name: str, row: Mapping[str, Any]) -> list[str]:
    cells = [name, f"{row['attainment']:.1%}"]
    for metric in ("ttft_ms", "tpot_ms"):
        values = row[metric]
        cells += ["-"] * 3 if values is None else [f"{values[f'p{p}']:.1f}" for p in _PERCENTILES]
    return [*cells, str(row["num_failed"])]


RUN_COLUMNS: Final = (
    "system",
    "attainment",
    *(f"{metric} p{p} ms" for metric in ("TTFT", "TPOT") for p in _PERCENTILES),
    "failed",
)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned; all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def _percentiles(seconds: np.ndarray) -> dict[str, float] | None:
    values = seconds[~np.isnan(seconds)] * 1e3
    if values.size == 0:
        return None
    found = np.percentile(values, _PERCENTILES).tolist()
    named = {f"p{p}": value for p, value in zip(_PERCENTILES, found, strict=True)}
    return {"mean": float(values.mean()), **named}
