"""A worker that warms up beside running ones gives way to them on the CPU."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_CAP_SYS_NICE: Final = 23


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """Runs the body on time that nobody else wants: all threads, and those that it starts.

    SCHED_IDLE, not the lowest niceness: whoever wakes up takes the core at once, instead of after
    the rest of a time slice.

    Does nothing where the way back would be refused: it takes CAP_SYS_NICE or RLIMIT_NICE.
    """
    if not _may_return_to(os.getpriority(os.PRIO_PROCESS, 0)):
        yield
        return
    before = os.sched_getscheduler(0)
    _set_all(os.SCHED_IDLE)
    try:
        yield
    finally:
        _set_all(before)


def _may_return_to(niceness: int) -> bool:
    status = Path("/proc/self/status").read_text().splitlines()
    capabilities = next(int(s.split()[1], 16) for s in status if s.startswith("CapEff:"))
    limit, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return bool(capabilities >> _CAP_SYS_NICE & 1) or limit >= 20 - niceness


def _set_all(policy: int) -> None:
    """On Linux every thread has a policy of its own."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setscheduler(int(thread), policy, os.sched_param(0))
