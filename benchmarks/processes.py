"""An engine's processes from outside: CPU time, and the coordinator's state when all is done."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from semipd_jax.messages import FromCoordinator, GetStats, Stats, ToCoordinator
from semipd_jax.transport.channels import CLIENTS, Link

_TIMEOUT_S: Final = 60.0

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def cpu_seconds(own_name: str) -> dict[str, float]:
    """User and system seconds since each process started. This one is called `own_name`."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # The name, in parentheses, may hold anything; the fields after it start with the state.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        seconds[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    own = os.getpid()
    found = {own_name: seconds[own]}
    for pid in parents:
        if pid != own and _descends(pid, own, parents):
            found[_title(pid)] = seconds[pid]
    return found


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        if pid == ancestor:
            return True
        pid = parents[pid]
    return False


def _title(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return str(pid)
    return b" ".join(words).decode(errors="replace").strip() or str(pid)


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
