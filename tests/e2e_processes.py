"""Finds the processes of engines by the names they give themselves."""

import time

import psutil


def kill(name: str) -> bool:
    """Kills this process's child of that name and returns when it is gone; False if there is none.
    The launcher, which is in this process, reaps it."""
    victim = engine_processes().get(name)
    if victim is None:
        return False
    victim.kill()
    deadline = time.monotonic() + 60
    while victim in engine_processes().values():
        assert time.monotonic() < deadline, f"{name} survives"
        time.sleep(0.001)
    return True


def engine_processes(pid: int | None = None) -> dict[str, psutil.Process]:
    """Descendants of a process (None: of this one) by name. Those that have ended and were not
    reaped have none."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline()).strip()
        except (psutil.Error, FileNotFoundError):  # psutil may find half of what /proc has of it
            continue
        if title.startswith("semipd: "):
            found[title.removeprefix("semipd: ")] = process
    return found
