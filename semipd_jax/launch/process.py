"""One child process and its two pipes."""

import contextlib
import io
import logging
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from semipd_jax import errors
from semipd_jax.errors import EngineError
from semipd_jax.messages import ChildSpec, Failed, FromChild, ToChild

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder[Any](FromChild)
_MAX_LINE_BYTES: Final = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is gone and reaped. `status` is negative after a signal."""

    status: int


type Events = "queue.SimpleQueue[tuple[Process, FromChild | Exited] | None]"
"""What processes say and that they ended, in the order it was heard. None: nothing more to do."""


class Process:
    """A running `python -m module` child, told by `send`, heard on `events`.

    One thread tells it, another one listens to it: a child that hangs holds up nobody.
    Its own process group keeps a terminal's Ctrl-C from reaching it: who stops is decided here.
    Closing its standard input asks it to stop, as does the death of this process.
    """

    def __init__(
        self,
        module: str,
        spec: ChildSpec,
        events: Events,
    ) -> None:
        self.name = spec.name
        self.spec = spec
        self._events = events
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        assert isinstance(self._popen.stdin, io.BufferedWriter)
        self._stdin = self._popen.stdin.detach()  # a buffer could fail to flush at close
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.send(spec)
        self._start_threads()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send(self, message: ToChild) -> None:
        """Tells the child something, after all that was sent before, and does not wait until it
        reads. Does nothing if it is gone: `Exited` says so."""
        self._lines.put(_encoder.encode(message) + b"\n")

    def ask_to_stop(self) -> None:
        """It learns this after all that was sent before."""
        self._lines.put(None)

    def kill(self) -> None:
        self._popen.kill()

    def wait(self, deadline_s: float) -> bool:
        """True if the process is gone by `deadline_s` (`time.monotonic`)."""
        try:
            self._popen.wait(max(deadline_s - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _start_threads(self) -> None:
        try:
            threading.Thread(target=self._listen, name=f"listen {self.name}", daemon=True).start()
            threading.Thread(target=self._tell, name=f"tell {self.name}", daemon=True).start()
        except BaseException:
            self._stdin.close()
            self.kill()
            raise

    def _tell(self) -> None:
        """Waits for as long as the child does not read; its death ends that."""
        with self._stdin, contextlib.suppress(BrokenPipeError):
            while (line := self._lines.get()) is not None:
                while line:
                    line = line[self._stdin.write(line) :]

    def _listen(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            while line := lines.readline(_MAX_LINE_BYTES):
                try:
                    message = _decoder.decode(line)
                except msgspec.DecodeError as error:
                    _log.error("%s said something unreadable and is killed: %s", self.name, error)
                    self.kill()
                    break
                self._events.put((self, message))
        status = self._popen.wait()
        self.ask_to_stop()
        self._events.put((self, Exited(status)))


def failure(name: str, status: int, words: Failed | None) -> EngineError:
    """What to tell about a process that ended by itself: of the kind that its last words name."""
    if words is not None:
        kind = getattr(errors, words.kind, EngineError)
        return kind(f"{name}: {words.message}")
    how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    return EngineError(f"{name} {how}")
