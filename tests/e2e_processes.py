"""Finds the processes of engines by the names they give themselves."""

import psutil


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
