"""An engine's processes from outside: CPU time, and the coordinator's state when all is done."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

import psutil

from semipd_jax.messages import FromCoordinator, GetStats, Stats, ToCoordinator
from semipd_jax.transport.channels import CLIENTS, Link

_TIMEOUT_S: Final = 60.0

# psutil may find half of what /proc has of a process that just ends.
_ENDED: Final = (psutil.Error, FileNotFoundError)


def engine_processes(pid: int | None = None) -> dict[str, psutil.Process]:
    """Descendants of a process (None: of this one) by the names that an engine's give themselves,
    without "semipd: ". Those that have ended and were not reaped have none."""
    return {
        title.removeprefix("semipd: "): process
        for title, process in _descendants(pid)
        if title.startswith("semipd: ")
    }


def cpu_seconds(own_name: str) -> dict[str, float]:
    """User and system seconds of all descendants since each started, by the words that it was
    started with or calls itself. This process is called `own_name`."""
    seconds = {own_name: _cpu_s(psutil.Process())}
    for title, process in _descendants(None):
        with contextlib.suppress(*_ENDED):
            seconds[title] = _cpu_s(process)
    return seconds


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _descendants(pid: int | None) -> Iterator[tuple[str, psutil.Process]]:
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(*_ENDED):
            yield " ".join(process.cmdline()).strip(), process


def idle_stats(run_dir: str) -> Stats:
    """The coordinator's, as soon as nothing runs, or after a while anyway."""
    return stats_when(run_dir, lambda s: s.num_running == 0 and s.num_free_pages == s.num_pages)


def stats_when(run_dir: str, condition: Callable[[Stats], bool]) -> Stats:
    """The coordinator's, as soon as they are so, or after a while anyway."""
    link = Link[FromCoordinator, ToCoordinator](
        run_dir, CLIENTS, f"stats-{time.monotonic_ns()}", FromCoordinator
    )
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while True:
            link.send(GetStats(1))
            stats = link.receive(_TIMEOUT_S)
            if not isinstance(stats, Stats):
                raise RuntimeError("the coordinator does not answer")
            if condition(stats) or time.monotonic() > deadline:
                return stats
            time.sleep(0.1)
    finally:
        link.close()
