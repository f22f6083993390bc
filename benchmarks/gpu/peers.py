"""Processes that check something together: told and heard in JSON lines, with a time limit."""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

from semipd_jax.config import Lane, Platform
from semipd_jax.shares import backend as shares
from semipd_jax.storage.backend import worker_environment

TIMEOUT_S: Final = 180.0
_MEMORY_FRACTION: Final = 0.1


class PeerError(Exception):
    """A peer ended or did not answer; its standard error says why."""


class Peer:
    """A `python -m` process."""

    def __init__(self, module: str, **setup: Any) -> None:
        self._name = module
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._rest = b""
        self.tell(**setup)

    def tell(self, **order: Any) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `hear` says that it is gone
            self._popen.stdin.write(json.dumps(order).encode() + b"\n")
            self._popen.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        fd = self._popen.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([fd], [], [], TIMEOUT_S)[0]:
                raise PeerError(f"{self._name} did not answer within {TIMEOUT_S:.0f} s")
            new = os.read(fd, 1 << 16)
            if not new:
                raise PeerError(f"{self._name} ended with status {self._popen.wait(TIMEOUT_S)}")
            self._rest += new
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def ask(self, **order: Any) -> dict[str, Any]:
        self.tell(**order)
        return self.hear()

    def end(self) -> int:
        """Lets the process leave by itself. Returns its status."""
        self._popen.communicate(timeout=TIMEOUT_S)
        return self._popen.returncode

    def kill(self) -> None:
        self._popen.kill()
        with contextlib.suppress(BrokenPipeError):
            self._popen.communicate(timeout=TIMEOUT_S)


@contextlib.contextmanager
def peers(module: str, setups: list[dict[str, Any]]) -> Iterator[list[Peer]]:
    """Started together; ended, by force if need be, with the context."""
    started: list[Peer] = []
    try:
        for setup in setups:
            started.append(Peer(module, **setup))
        yield started
    finally:
        for peer in started:
            peer.kill()


def orders() -> Iterator[dict[str, Any]]:
    """In a peer: what it is told. The first is its setup."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def take_share(platform: Platform, share: float, lane: Lane, terms: Mapping[str, str]) -> Any:
    """In a peer, before jax is imported: the environment of a worker. Returns its grant."""
    grant = shares.apply(platform, share, lane, terms)
    for name, value in worker_environment(platform, _MEMORY_FRACTION).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return grant


@contextlib.contextmanager
def answering(server: Any) -> Iterator[None]:
    """Answers whoever asks the memory server, on a thread."""
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            if select.select([server], [], [], 0.2)[0]:
                server.answer()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(TIMEOUT_S)
