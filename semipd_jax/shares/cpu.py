"""A share of the machine's cores. XLA:CPU makes one compute thread per core it may run on.

Prefill takes cores from one end and decode from the other, so that they meet only where the shares
add up to more than 1. Hardware threads of one core are neighbours in that order.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from semipd_jax.config import Lane, ShareConfig
from semipd_jax.errors import StartupError


@dataclass(frozen=True, slots=True)
class CoreGrant:
    """Cores of the `num_available` that this process could run on."""

    cores: frozenset[int]
    num_available: int

    def verify(self) -> str:
        for thread in _threads():
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                if outside := os.sched_getaffinity(thread) - self.cores:
                    raise StartupError(f"a thread may run outside its share, on {sorted(outside)}")
        return f"{len(self.cores)} of {self.num_available} cores: {sorted(self.cores)}"


def plan(share: float, lane: Lane) -> frozenset[int]:
    """The cores for a worker: `share` of those that this process may run on, rounded up."""
    cores = sorted(os.sched_getaffinity(0), key=lambda core: (_first_sibling(core), core))
    num_cores = math.ceil(round(share * len(cores), 6))  # 0.07 * 100 is a little more than 7
    return frozenset(cores[:num_cores] if lane == "prefill" else cores[-num_cores:])


def host(
    config: ShareConfig, run_dir: str, num_sms: int
) -> contextlib.AbstractContextManager[Mapping[str, str]]:
    """The kernel keeps processes to their cores; nothing else has to run."""
    return contextlib.nullcontext({})


def apply(share: float, lane: Lane, terms: Mapping[str, str]) -> CoreGrant:
    """Confines all threads of this process, and those to come."""
    grant = CoreGrant(plan(share, lane), len(os.sched_getaffinity(0)))
    for thread in _threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, grant.cores)
    # XLA would otherwise prefer a variable NPROC that happens to be set.
    os.environ["PJRT_NPROC"] = str(len(grant.cores))
    return grant


def abstain(run_dir: str) -> None:
    """Every core stays allowed."""


def evict(pid: int, terms: Mapping[str, str]) -> None:
    """Killing a process frees its cores."""


def is_fate_shared(terms: Mapping[str, str]) -> bool:
    """A process that fails is alone with that."""
    return False


def _threads() -> list[int]:
    return [int(thread) for thread in os.listdir("/proc/self/task")]


def _first_sibling(core: int) -> int:
    """The lowest-numbered hardware thread of the same physical core."""
    try:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        return int(path.read_text().replace("-", ",").split(",")[0])
    except FileNotFoundError:  # some containers hide it
        return core
