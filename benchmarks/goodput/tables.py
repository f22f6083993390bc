"""Goodput and ratios as markdown, with the ratios of semi-PD's paper beside ours."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.goodput.bootstrap import ratio_interval
from benchmarks.goodput.results import host_ms, rates_by_seed
from semipd_jax.config import PHASES
from semipd_jax.simulator.report import heading, table
from semipd_jax.tuner.semi_pd import LEAST_WINDOW
from semipd_jax.tuner.window import WINDOW_SIZE

FULL_STATIC: Final = "static:1,1"
OURS: Final = "predictive+spf"
PAPER_RATIOS: Final[Mapping[str, float]] = {
    "colocated": 1.72,
    "disaggregated": 1.62,
    "chunked": 1.55,
    FULL_STATIC: 1.11,
}
"""semi-PD's goodput over that of the system (arXiv 2504.19867, figure 15)."""
_SWITCHES: Final = tuple(f"{phase}_num_switches" for phase in PHASES)
_INTERVALS: Final = "(95 % bootstrap interval of repetitions; of two or three, their range)"
_ABOVE: Final = ("semi-pd", "predictive", OURS)

type Loads = Sequence[Mapping[str, Any]]
"""One result for each load: what it is of, and `systems`, name → `results.result_of`."""


def markdown(loads: Loads) -> str:
    parts = [f"{heading(load)}\n{_run(load['run'])}\n" for load in loads]
    parts += [
        f"Goodput, requests per second and device {_INTERVALS}:\n",
        goodputs(loads),
        "",
    ]
    if ratio_rows := ratios(loads):
        parts += [f"Ratios of goodput {_INTERVALS}:\n", ratio_rows, ""]
    for load in loads:
        if statics := load.get("statics"):
            parts.append(f"{load['workload']}: {_statics(statics)}")
        if still := ", ".join(_still(load["systems"])):
            parts.append(
                f"{load['workload']}: no share moved, which makes these static (100,100) with more "
                f"processes: {still}{_too_short(load['num_requests'])}"
            )
        if hosts := _host_times(load["systems"]):
            parts.append(f"{load['workload']}: CPU time beside the steps, ms per token: {hosts}")
    return "\n".join(parts) + "\n"


def _statics(statics: Mapping[str, Any]) -> str:
    """Says the best pair's attainment beside ours, to show how near it came."""
    better = ", ".join(statics["better"]) or "none"
    told = {name: met for name, met in statics["attainment"].items() if met is not None}
    ours = told.pop(OURS, None)
    best = max(told, key=told.__getitem__, default=None)
    if best is None or ours is None:
        return f"static pairs over 2 % better than {OURS}: {better}"
    return (
        f"static pairs over 2 % better than {OURS}: {better}; at a rate 2 % above its goodput "
        f"{best} attains {told[best]:.1%}, {OURS} {ours:.1%}"
    )


def _run(run: Mapping[str, Any]) -> str:
    """How a load was measured, as far as is known."""
    parts: list[str] = []
    if "settings" in run:
        parts.append(f"searches of each system: {run['settings']['repeat']}")
    if "commit" in run:
        parts.append(f"{run['date'][:10]} at {run['commit'][:12]}")
    if flags := run.get("flags"):
        parts.append(f"flags: `{flags}`")
    return "; ".join(parts)


def _still(systems: Mapping[str, Any]) -> list[str]:
    """Systems with a policy that could have moved shares and did not, in any seed."""
    found: list[str] = []
    for name, result in systems.items():
        counters = [seed["at_goodput"]["counters"] for seed in result["seeds"]]
        switches = [c[key] for c in counters for key in _SWITCHES if key in c]
        if switches and not any(switches) and not name.startswith("static"):
            found.append(name)
    return found


def _too_short(num_requests: int) -> str:
    if num_requests >= 2 * WINDOW_SIZE:
        return ""
    return (
        f"; Algorithm 1 acts after {WINDOW_SIZE} finished requests, or {LEAST_WINDOW} once a "
        f"minute has passed, and there are {num_requests}"
    )


def agreement(loads: Loads, others: Loads) -> str:
    """Goodput of the systems that both have, side by side."""
    found = {load["workload"]: load for load in others}
    rows: list[list[str]] = []
    for load in loads:
        other = found.get(load["workload"], {"systems": {}})
        for name in load["systems"].keys() & other["systems"].keys():
            here, there = (side["systems"][name]["goodput"] for side in (load, other))
            difference = f"{here / there - 1:+.0%}" if there else "-"
            rows.append([load["workload"], name, f"{here:.2f}", f"{there:.2f}", difference])
    return table(["load", "system", "this", "other", "difference"], sorted(rows)) + "\n"


def goodputs(loads: Loads) -> str:
    names = list(dict.fromkeys(name for load in loads for name in load["systems"]))
    rows = [[name, *(_goodput(load["systems"].get(name)) for load in loads)] for name in names]
    return table(["system", *(load["workload"] for load in loads)], rows)


def ratios(loads: Loads) -> str:
    """Empty if nothing can be compared."""
    rows: list[list[str]] = []
    for above in _ABOVE:
        for below, paper in PAPER_RATIOS.items():
            cells = [_ratio(load["systems"], above, below) for load in loads]
            if any(cell != "-" for cell in cells):
                rows.append([f"{above} / {below}", f"{paper:.2f}", *cells])
    for below in (f"{baseline}+spf" for baseline in PAPER_RATIOS):
        cells = [_ratio(load["systems"], OURS, below) for load in loads]
        if any(cell != "-" for cell in cells):
            rows.append([f"{OURS} / {below}", "", *cells])
    return table(["ratio", "paper", *(load["workload"] for load in loads)], rows) if rows else ""


def _host_times(systems: Mapping[str, Any]) -> str:
    """For those that were measured: `--host-ms` of a simulation."""
    times = {name: host_ms(result) for name, result in systems.items()}
    return ", ".join(f"{name} {ms:.2f}" for name, ms in times.items() if ms is not None)


def _goodput(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "-"
    return _with_interval(result["goodput"], result["interval"], len(result["seeds"]))


def _ratio(systems: Mapping[str, Any], above: str, below: str) -> str:
    if not {above, below} <= systems.keys() or not systems[below]["goodput"]:
        return "-"
    ratio = systems[above]["goodput"] / systems[below]["goodput"]
    rates = [rates_by_seed(systems[name]) for name in (above, below)]
    return _with_interval(ratio, ratio_interval(*rates), len(rates[0]))


def _with_interval(value: float, interval: Sequence[float], num_seeds: int) -> str:
    """Nothing is known about the spread of a single seed."""
    low, high = interval
    return f"{value:.2f} ({low:.2f}-{high:.2f})" if num_seeds > 1 else f"{value:.2f}"
