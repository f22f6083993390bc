"""What every child process of the launcher shares: how it starts, reports, is told and stops.

Standard input brings JSON lines of `messages.ToChild`, the first of them a `ChildSpec`, and is the
lifeline: at end of file the launcher is gone or wants the child to stop. Standard output carries
JSON lines of `messages.FromChild` and nothing else. `run_child` moves both to private descriptors,
so that neither a stray print nor a library can touch them.

A child that was asked to stop and has not left within the grace period prints where its threads
are and is ended.
"""

import contextlib
import faulthandler
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Never

import msgspec
from setproctitle import setproctitle

from semipd_jax import errors, logs
from semipd_jax.messages import (
    Alive,
    ChildSpec,
    Drain,
    Failed,
    FromChild,
    MemoryLayout,
    Progress,
    Ready,
    Serve,
    ShareUnavailable,
    ToChild,
    WaitingFor,
    WorkerLost,
)

type Command = WorkerLost | ShareUnavailable | Serve | WaitingFor | Drain
"""What a running child is told."""

GRACE_S: Final = 10.0
_SPEC_TIMEOUT_S: Final = 30.0
_SIGN_EVERY_S: Final = 1.0
_MAX_LINE_BYTES: Final = 1 << 20

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder[Any](ToChild)


class Child:
    """This process as its `main` sees it. All methods may be called from any thread.

    Attributes:
      spec: what the launcher wants this process to be.
      stopping: set once, when the launcher is gone or asks for it: leave soon.
    """

    def __init__(self, spec: ChildSpec, report_fd: int) -> None:
        self.spec = spec
        self.stopping = threading.Event()
        self._commands: list[Command] = []
        self._commands_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._report_fd = report_fd
        self._report_lock = threading.Lock()
        self._alive_s = 0.0

    def fileno(self) -> int:
        """Becomes readable when a command arrives or a stop is asked for; `receive` resets it."""
        return self._wake_fd

    def receive(self) -> list[Command]:
        """The commands that have arrived since the last call. Does not wait."""
        with self._commands_lock, contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
            commands, self._commands = self._commands, []
            return commands
        return []

    def wait(self, timeout_s: float) -> None:
        """Returns when there is something to receive, when a stop is asked for, or in time."""
        select.select([self._wake_fd], [], [], timeout_s)

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self.send(Progress(stage=stage, done=done, total=total, detail=detail))

    def alive(self) -> None:
        """Says that this process does not hang, once a second at most."""
        if time.monotonic() - self._alive_s >= _SIGN_EVERY_S:
            self._alive_s = time.monotonic()
            self.send(Alive())

    def ready(
        self,
        *,
        layout: MemoryLayout | None = None,
        address: str | None = None,
        http_address: str | None = None,
        private_bytes: int | None = None,
    ) -> None:
        self.send(
            Ready(
                layout=layout,
                address=address,
                http_address=http_address,
                private_bytes=private_bytes,
            )
        )

    def send(self, message: FromChild) -> None:
        """Reports to the launcher. Does nothing if it is gone: `stopping` says so."""
        line = _encoder.encode(message) + b"\n"
        with self._report_lock, contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._report_fd, line) :]

    def _command(self, command: Command) -> None:
        with self._commands_lock:
            self._commands.append(command)
            os.eventfd_write(self._wake_fd, 1)

    def _stop(self) -> None:
        self.stopping.set()
        os.eventfd_write(self._wake_fd, 1)


class _Lines:
    """Complete lines that arrive at a file descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[bytes]:
        """Waits for bytes and returns the lines they complete; raises EOFError at the end."""
        new = os.read(self._fd, 1 << 16)
        if not new:
            raise EOFError
        *lines, self._rest = (self._rest + new).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            raise ValueError(f"a line on standard input is longer than {_MAX_LINE_BYTES} bytes")
        return lines


def run_child(main: Callable[[Child], None], *, grace_s: float = GRACE_S) -> Never:
    """Runs `main` as a child of the launcher, then exits: with status 0 if it returned, else 1.

    `main` returns soon after `child.stopping` is set. What it raises is reported as `Failed`;
    unexpected exceptions also leave a traceback on standard error.
    """
    faulthandler.enable()
    for signum in (signal.SIGINT, signal.SIGTERM):  # they reach the launcher too, which decides
        signal.signal(signum, signal.SIG_IGN)
    lines, report_fd = _Lines(_take_over(0, os.O_RDONLY)), _take_over(1, None)
    try:
        spec, rest = _read_spec(lines)
    except EOFError:
        sys.exit(1)  # the launcher is gone already
    setproctitle(f"semipd: {spec.name}")
    logs.configure(spec.name, spec.config.log_level, spec.config.log_format)
    child = Child(spec, report_fd)
    launcher_fd = os.pidfd_open(os.getppid())
    threading.Thread(
        target=_watch, args=(child, lines, rest, launcher_fd, grace_s), name="lifeline", daemon=True
    ).start()
    status = 0
    try:
        main(child)
    except Exception as error:
        child.send(_failure(error))
        status = 1
    if not child.stopping.is_set():
        _end_after(grace_s)
    sys.exit(status)


def freeze_heap() -> None:
    """For the end of a start, in processes that must not pause. What was made so far lives on, and
    no collection looks at it again, which would take tens of ms. With a thousand requests the rest
    takes nearly as long: it is looked through ten times as seldom as Python would."""
    gc.collect()
    gc.freeze()
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 10 * old)


def _take_over(fd: int, null_flags: int | None) -> int:
    """Moves `fd` to a private descriptor; what stays is /dev/null, or else standard error."""
    private = os.dup(fd)
    replacement = os.dup(2) if null_flags is None else os.open(os.devnull, null_flags)
    os.dup2(replacement, fd)
    os.close(replacement)
    return private


def _read_spec(lines: _Lines) -> tuple[ChildSpec, list[bytes]]:
    """The first line, and those that came with it."""
    deadline = time.monotonic() + _SPEC_TIMEOUT_S
    while select.select([lines], [], [], max(deadline - time.monotonic(), 0.0))[0]:
        if complete := lines.read():
            spec = _decoder.decode(complete[0])
            if not isinstance(spec, ChildSpec):
                raise ValueError(f"the first line on standard input is no ChildSpec: {spec!r}")
            return spec, complete[1:]
    raise TimeoutError(f"no ChildSpec on standard input within {_SPEC_TIMEOUT_S} s")


def _watch(
    child: Child, lines: _Lines, complete: list[bytes], launcher_fd: int, grace_s: float
) -> None:
    """Passes commands on until a stop is asked for. A damaged line ends the process.

    The launcher is watched too: a process that it forked may keep our standard input open.
    """
    try:
        while True:
            for line in complete:
                child._command(_decode_command(line))
            if launcher_fd in select.select([lines, launcher_fd], [], [])[0]:
                break
            complete = lines.read()
    except EOFError:
        pass
    except ValueError as error:
        child.send(_failure(error))
        os._exit(1)
    _end_after(grace_s)
    child._stop()


def _decode_command(line: bytes) -> Command:
    command = _decoder.decode(line)
    if isinstance(command, ChildSpec):
        raise ValueError("a second ChildSpec on standard input")
    return command


def _end_after(grace_s: float) -> None:
    """Ends the process in `grace_s` seconds, whatever its threads, or its own exit, wait for."""
    faulthandler.dump_traceback_later(grace_s, exit=True)


def _failure(error: Exception) -> Failed:
    for kind in type(error).__mro__:
        if kind.__module__ == errors.__name__:
            return Failed(kind=kind.__name__, message=str(error))
    _log.error("unexpected failure", exc_info=error)
    return Failed(kind=errors.EngineError.__name__, message=f"{type(error).__name__}: {error}")
