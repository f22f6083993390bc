"""The search: brackets the rate by factors, then bisects.

Every trial of a seed replays the same requests, stretched in time, so that all subjects see the
same load. Subjects take turns with whole searches: one of each with the first seed, then one of
each with the next. What lasts longer than a round hits all alike; what is shorter than a search may
hit one of them, and shows in the spread over the seeds.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from semipd_jax.simulator.run import Outcome
from semipd_jax.tuner.slo import SloTargets

type Trial = Callable[[float], Outcome]
"""Runs a load at a rate, in requests per second and device."""

_FACTOR: Final = 1.5
MOST_RATE: Final = 1e5


@runtime_checkable
class Subject(Protocol):
    """What is measured: a simulated system, or a server."""

    @property
    def name(self) -> str: ...

    def running(self, seed: int) -> AbstractContextManager[Trial]:
        """Trials with the load of this seed, for as long as it is open."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """One search.

    Attributes:
      rate: the highest one that held the targets; 0 if none did.
      trials: rate → what happened, ascending.
    """

    seed: int
    rate: float
    trials: dict[float, Outcome]

    @property
    def best(self) -> Outcome:
        """At the highest rate that held, or at the lowest that was tried."""
        return self.trials[self.rate or min(self.trials)]


def take_turns(
    subjects: Sequence[Subject],
    targets: SloTargets,
    seeds: Sequence[int],
    *,
    start_rate: float,
    least_rate: float,
    precision: float,
    progress: Callable[[str], None],
) -> dict[str, list[Found]]:
    """Subject → one search for each seed; all subjects search before the next seed begins. A search
    starts from the rate of the one before."""
    found: dict[str, list[Found]] = {subject.name: [] for subject in subjects}
    rate = start_rate
    for seed in seeds:
        for subject in subjects:
            with subject.running(seed) as trial:
                one = find(trial, targets, seed, rate, least_rate, precision)
            found[subject.name].append(one)
            rate = one.rate or rate
            progress(f"{subject.name}, seed {seed}: {one.rate:.2f}/s in {len(one.trials)} trials")
    return found


def find(
    trial: Trial, targets: SloTargets, seed: int, start: float, least: float, precision: float
) -> Found:
    trials: dict[float, Outcome] = {}

    def holds(rate: float) -> bool:
        trials[rate] = trial(rate)
        return trials[rate].attainment(targets.default) >= targets.attainment

    rate = highest(holds, start, least, precision)
    return Found(seed, rate, dict(sorted(trials.items())))


def highest(holds: Callable[[float], bool], start: float, least: float, precision: float) -> float:
    """The highest rate that `holds`, within a relative `precision`; 0 if it is below `least`.

    Raises:
      ValueError: a rate of MOST_RATE still holds. The load is too short to tell.
    """
    good, bad, rate = 0.0, math.inf, start
    while not good or bad == math.inf:
        if holds(rate):
            good, rate = rate, rate * _FACTOR
        else:
            bad, rate = rate, rate / _FACTOR
        if rate < least:
            return 0.0
        if rate > MOST_RATE:
            raise ValueError(f"{good:.0f} requests/s still hold the targets: the load is too short")
    while bad > good * (1 + precision):
        middle = (good + bad) / 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good
