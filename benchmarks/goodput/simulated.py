"""Simulated systems as subjects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from benchmarks.goodput.search import Trial
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
        workload, setup = self.load(seed), replace(self.setup, seed=seed)
        yield lambda rate: run_at(self.system, setup, workload, rate)
