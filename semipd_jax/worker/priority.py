"""A worker that warms up beside running ones gives way to them on the CPU."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LOWEST: Final = 19
_CAP_SYS_NICE: Final = 23


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """Runs the body at the lowest priority, all threads of this process and those it starts.

    Does nothing where the priority could not be raised again afterwards: that takes the right to
    (CAP_SYS_NICE, or RLIMIT_NICE).
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if not _may_return_to(before):
        yield
        return
    _set_all(_LOWEST)
    try:
        yield
    finally:
        _set_all(before)


def _may_return_to(niceness: int) -> bool:
    status = Path("/proc/self/status").read_text().splitlines()
    capabilities = next(int(s.split()[1], 16) for s in status if s.startswith("CapEff:"))
    limit, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return bool(capabilities >> _CAP_SYS_NICE & 1) or limit >= 20 - niceness


def _set_all(niceness: int) -> None:
    """On Linux every thread has a niceness of its own."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
