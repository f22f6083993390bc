"""semi-PD's comparisons (arXiv 2504.19867, figure 15), with the paper's ratios beside ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from semipd_jax.simulator.goodput import Goodput, goodput, run_at
from semipd_jax.simulator.report import table
from semipd_jax.simulator.systems import Setup, System, parse
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner.policy import Ladder

FULL_STATIC: Final = "static:1,1"
OURS: Final = "predictive+spf"
PAPER_RATIOS: Final[Mapping[str, float]] = {
    "colocated": 1.72,
    "disaggregated": 1.62,
    "chunked": 1.55,
    FULL_STATIC: 1.11,
}
"""semi-PD's goodput over that of the system, on 8B and 70B models and an A100."""

SYSTEMS: Final = (
    "disaggregated",
    "colocated",
    "chunked",
    FULL_STATIC,
    "static:0.8,1",
    "semi-pd",
    "semi-pd-replan",
    "predictive",
    f"{FULL_STATIC}+spf",
    OURS,
)
_BEST_STATIC_SLACK: Final = 0.98


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    Attributes:
      goodputs: by system, in the order of the table.
      better_statics: pairs of rungs that still hold the targets at the rate at which `OURS` would
        be 0.98 times as good as they are; none if ours is at least that good.
    """

    workload: str
    goodputs: dict[str, Goodput]
    better_statics: tuple[str, ...]


def compare(
    names: Sequence[str],
    setup: Setup,
    workload: Workload,
    *,
    start_rate: float,
    progress: Callable[[str], None],
) -> Comparison:
    goodputs: dict[str, Goodput] = {}
    rate = start_rate
    for name in names:
        found = goodputs[name] = goodput(parse(name), setup, workload, start_rate=rate)
        rate = found.rate or rate
        progress(f"{workload.name}: {name} {found.rate:.2f}/s in {found.num_runs} runs")
    ours = goodputs.get(OURS)
    better: tuple[str, ...] = ()
    if ours is not None and ours.rate:
        better = better_statics(setup, workload, ours.rate / _BEST_STATIC_SLACK)
        progress(f"{workload.name}: static pairs better than {OURS}: {', '.join(better) or 'none'}")
    return Comparison(workload.name, goodputs, better)


def better_statics(setup: Setup, workload: Workload, rate: float) -> tuple[str, ...]:
    """Static pairs of rungs, under either order, that hold the targets at this rate."""
    targets = setup.targets

    def holds(system: System) -> bool:
        outcome = run_at(system, setup, workload, rate)
        return outcome.attainment(targets.default) >= targets.attainment

    return tuple(name for name in static_pairs(setup.ladder) if holds(parse(name)))


def static_pairs(ladder: Ladder) -> list[str]:
    return [f"static:{x:g},{y:g}{order}" for x in ladder for y in ladder for order in ("", "+spf")]


def goodput_table(comparisons: Sequence[Comparison]) -> str:
    """Requests per second and device."""
    names = list(comparisons[0].goodputs)
    rows = [[name, *(f"{c.goodputs[name].rate:.2f}" for c in comparisons)] for name in names]
    return table(["goodput, req/s per GPU", *(c.workload for c in comparisons)], rows)


def ratio_table(comparisons: Sequence[Comparison]) -> str:
    rows: list[list[str]] = []
    for ours in ("semi-pd", "predictive", OURS):
        for other, paper in PAPER_RATIOS.items():
            if {ours, other} <= comparisons[0].goodputs.keys():
                ratios = [
                    _ratio(c.goodputs[ours].rate, c.goodputs[other].rate) for c in comparisons
                ]
                rows.append([f"{ours} / {other}", f"{paper:.2f}", *ratios])
    return table(["ratio", "paper", *(c.workload for c in comparisons)], rows)


def _ratio(ours: float, other: float) -> str:
    return f"{ours / other:.2f}" if other else "-"
