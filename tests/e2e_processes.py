"""Kills processes of engines by the names they give themselves."""

import time

from benchmarks.processes import engine_processes


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
