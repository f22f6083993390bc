"""Goodput: the highest rate at which enough requests meet both targets, per device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from semipd_jax.simulator.run import Outcome, run
from semipd_jax.simulator.systems import Setup, System, build
from semipd_jax.simulator.workloads import Workload

_FACTOR: Final = 1.5
_MOST_STEPS: Final = 16


@dataclass(frozen=True, slots=True)
class Goodput:
    """
    Attributes:
      rate: requests per second and device; 0 if even `least_rate` is too much.
      outcome: of the run at that rate, or at the least one.
      num_runs: simulations that it took.
    """

    system: System
    rate: float
    attainment: float
    outcome: Outcome
    num_runs: int


def run_at(system: System, setup: Setup, workload: Workload, rate: float) -> Outcome:
    """
    Args:
      rate: requests per second and device.
    """
    return run(workload.at(rate * system.num_devices), build(system, setup, workload))


def goodput(
    system: System,
    setup: Setup,
    workload: Workload,
    *,
    start_rate: float,
    least_rate: float = 0.01,
    precision: float = 0.02,
) -> Goodput:
    """Brackets the rate by factors of 1.5 from `start_rate`, then bisects to `precision`.

    Every run replays the same requests, stretched in time, so systems see the same load.
    """
    tried: dict[float, Outcome] = {}
    target = setup.targets

    def holds(rate: float) -> bool:
        tried[rate] = run_at(system, setup, workload, rate)
        return tried[rate].attainment(target.default) >= target.attainment

    rate = _highest(holds, start_rate, least_rate, precision)
    outcome = tried[rate or min(tried)]
    return Goodput(system, rate, outcome.attainment(target.default), outcome, len(tried))


def _highest(holds: Callable[[float], bool], start: float, least: float, precision: float) -> float:
    good = bad = 0.0
    rate = start
    for _ in range(_MOST_STEPS):
        if holds(rate):
            good = rate
        else:
            bad = rate
        rate = rate * _FACTOR if good else rate / _FACTOR
        if (good and bad) or rate < least:
            break
    while good and bad > good * (1 + precision):
        middle = (good + bad) / 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good
