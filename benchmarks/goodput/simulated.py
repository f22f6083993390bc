"""Simulated systems as subjects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from benchmarks.goodput.search import Trial
from semipd_jax.simulator.run import Goal
from semipd_jax.simulator.systems import Setup, System, run_at
from semipd_jax.simulator.workloads import Workload


@dataclass(frozen=True, slots=True)
class Simulated:
    """
    Attributes:
      load: seed → requests.
    """

    system: System
    setup: Setup
    load: Callable[[int], Workload]

    @property
    def name(self) -> str:
        return self.system.name

    @contextmanager
    def running(self, seed: int) -> Iterator[Trial]:
        workload, setup = self._seeded(seed)
        yield lambda rate: run_at(self.system, setup, workload, rate)

    def attainment(self, seed: int, rate: float, least: float) -> float:
        """At one rate. Exact if it is `least` or more, else below `least` and perhaps too low."""
        workload, setup = self._seeded(seed)
        target = setup.targets.default
        return run_at(self.system, setup, workload, rate, Goal(target, least)).attainment(target)

    def _seeded(self, seed: int) -> tuple[Workload, Setup]:
        return self.load(seed), replace(self.setup, seed=seed)
