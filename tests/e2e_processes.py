"""Finds the processes of engines that this process started."""

import psutil


def engine_processes() -> dict[str, psutil.Process]:
    """Child processes of this one by the name they gave themselves."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline()).strip()
        except psutil.Error:
            continue
        if title.startswith("semipd: "):
            found[title.removeprefix("semipd: ")] = process
    return found
