"""`python -m semipd_jax.serve` as a process, with its log in a file."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.processes import engine_processes

SMALL = ("--max-num-seqs=4", "--max-num-batched-tokens=64", "--port=0", "--http-port=0")


class Server:
    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "semipd_jax.serve", *flags], stderr=file
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str, *, timeout_s: float = 240.0) -> re.Match[str]:
        deadline = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.log)) is None:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, f"{pattern!r} is not in the log:\n{self.log}"
            time.sleep(0.05)
        return found

    def family(self) -> dict[str, psutil.Process]:
        return engine_processes(self.process.pid)


@contextmanager
def serving(log: Path, *flags: str) -> Iterator[Server]:
    """Leaves no process."""
    server = Server(log, *SMALL, *flags)
    try:
        yield server
    finally:
        with contextlib.suppress(psutil.Error):
            for process in server.family().values():
                process.kill()
        server.process.kill()
        server.process.wait(60)
