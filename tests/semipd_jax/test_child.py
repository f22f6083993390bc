import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from semipd_jax.child import freeze_heap
from semipd_jax.config import EngineConfig, ModelConfig
from semipd_jax.messages import (
    ChildSpec,
    Drain,
    Failed,
    FromChild,
    Progress,
    Ready,
    ToChild,
    WorkerLost,
)

SPEC = ChildSpec(
    name="test child", run_dir="/nowhere", config=EngineConfig(model=ModelConfig(path="/model"))
)
DECODER = msgspec.json.Decoder[Any](FromChild)


class Process:
    """A child with the given body of `main(child)`, and the launcher's ends of its pipes."""

    def __init__(self, body: str, grace_s: float) -> None:
        script = (
            "import ctypes, os, sys, time\n"
            "from semipd_jax.child import run_child\n"
            "from semipd_jax.errors import CheckpointError\n"
            "def main(child):\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
            f"run_child(main, grace_s={grace_s})\n"
        )
        self.popen = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.popen.stdin
        assert self.popen.stdout
        self.stdin, self.stdout = self.popen.stdin, self.popen.stdout

    def tell(self, message: ToChild) -> None:
        self.write(msgspec.json.encode(message) + b"\n")

    def write(self, data: bytes) -> None:
        self.stdin.write(data)
        self.stdin.flush()

    def hear(self) -> Any:
        return DECODER.decode(self.stdout.readline())

    def end(self) -> tuple[int, str, bytes]:
        """Waits for the exit. Returns status, standard error and the rest of standard output."""
        rest, stderr = self.popen.communicate(timeout=60)
        return self.popen.returncode, stderr.decode(), rest


@contextlib.contextmanager
def child(body: str, first: ToChild | None = SPEC, *, grace_s: float = 60.0) -> Iterator[Process]:
    process = Process(body, grace_s)
    with process.popen:
        try:
            if first is not None:
                process.tell(first)
            yield process
        finally:
            process.popen.kill()


def wait_for_stop(then: str = "") -> str:
    return "child.ready()\nwhile not child.stopping.is_set():\n    child.wait(10)\n" + then


def test_reports_and_exits_when_main_returns() -> None:
    body = """
        child.progress("load", 1, 2, detail=child.spec.run_dir)
        child.ready(address="here")
    """
    with child(body) as process:
        assert process.hear() == Progress(stage="load", done=1, total=2, detail="/nowhere")
        assert process.hear() == Ready(address="here")
        assert process.end() == (0, "", b"")


def test_names_the_process() -> None:
    with child(wait_for_stop()) as process:
        process.hear()
        with open(f"/proc/{process.popen.pid}/cmdline", "rb") as file:
            assert file.read().rstrip(b"\0") == b"semipd: test child"


def test_stray_output_and_input_do_not_touch_the_pipes() -> None:
    body = """
        print("stray", flush=True)
        os.write(1, b"raw stray\\n")
        os.system("echo from a subprocess")
        assert sys.stdin.read() == ""
        child.ready()
    """
    with child(body) as process:
        status, stderr, stdout = process.end()
        assert status == 0
        assert stderr.split("\n")[:3] == ["stray", "raw stray", "from a subprocess"]
        assert DECODER.decode(stdout) == Ready()


def test_commands_arrive_in_order_and_wake_a_poll() -> None:
    body = """
        import select
        num_seen = 0
        while num_seen < 3:
            assert select.select([child.fileno()], [], [], 10)[0], "not woken"
            commands = child.receive()
            num_seen += len(commands)
            if num_seen == 3:
                assert not select.select([child.fileno()], [], [], 0)[0], "still readable"
            for command in commands:
                child.progress(command.worker_id, 0, 0)
    """
    with child(body) as process:
        lost = [WorkerLost(worker_id=name, lane="decode") for name in "abc"]
        a, b, c = (msgspec.json.encode(message) + b"\n" for message in lost)
        process.write(a + b + c[:9])  # a line may arrive in pieces
        assert [process.hear().stage for _ in range(2)] == ["a", "b"]
        process.write(c[9:])
        assert process.hear().stage == "c"
        assert process.end() == (0, "", b"")


def test_command_sent_together_with_the_spec_is_not_lost() -> None:
    body = "child.wait(10)\nchild.progress(str(child.receive()), 0, 0)"
    with child(body, first=None) as process:
        lines = [msgspec.json.encode(message) + b"\n" for message in (SPEC, Drain())]
        process.write(b"".join(lines))
        assert process.hear().stage == "[Drain()]"


def test_concurrent_reports_stay_whole() -> None:
    body = """
        import threading
        def report(name):
            for i in range(50):
                child.progress(name, i, 50, detail="x" * 20_000)
        threads = [threading.Thread(target=report, args=(name,)) for name in "abcd"]
        [t.start() for t in threads]
        [t.join() for t in threads]
    """
    with child(body) as process:
        status, _, stdout = process.end()
    messages = [DECODER.decode(line) for line in stdout.splitlines()]
    assert status == 0
    for name in "abcd":
        assert [m.done for m in messages if m.stage == name] == list(range(50))


def test_stops_at_end_of_file() -> None:
    with child(wait_for_stop("child.progress('left', 0, 0)")) as process:
        process.hear()
        assert process.end()[0] == 0  # communicate() closes standard input


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_are_the_launchers_business(signum: int) -> None:
    with child(wait_for_stop()) as process:
        process.hear()
        process.popen.send_signal(signum)
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(0.3)
        assert process.end()[0] == 0


@pytest.mark.parametrize(
    "body",
    [
        "child.ready()\nwhile True: time.sleep(0.01)",
        "child.ready()\nlock = ctypes.CDLL(None).pthread_mutex_lock\n"
        "mutex = ctypes.create_string_buffer(64)\nlock(mutex)\nlock(mutex)",
        "import atexit\natexit.register(time.sleep, 60)\nchild.ready()",
    ],
    ids=["in python", "in c", "on its way out"],
)
def test_child_that_does_not_stop_is_ended_and_says_where_it_hung(body: str) -> None:
    with child(body, grace_s=0.5) as process:
        process.hear()
        status, stderr, _ = process.end()
        assert status == 1
        assert "Timeout (0:00:00.500000)!" in stderr
        assert "most recent call first" in stderr


def test_launcher_killed() -> None:
    script = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
        if sys.argv[2]:
            child.stdin.write(sys.argv[2].encode() + b"\\n")
            child.stdin.flush()
        time.sleep(60)
    """
    body = "from semipd_jax.child import run_child\nrun_child(lambda child: child.stopping.wait())"
    for first in ("", msgspec.json.encode(SPEC).decode()):  # before and after the spec
        launcher = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), body, first], stdout=subprocess.PIPE
        )
        with launcher:
            pid = child_of(launcher.pid)
            pidfd = os.pidfd_open(pid)
            launcher.kill()
            launcher.wait(60)
            assert wait_for_exit(pidfd, 60), "the child outlived its launcher"


def child_of(pid: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            if children := file.read().split():
                return int(children[0])
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} has no child")


def wait_for_exit(pidfd: int, timeout_s: float) -> bool:
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def test_engine_errors_are_reported_by_name() -> None:
    with child("raise CheckpointError('model.safetensors is damaged')") as process:
        assert process.hear() == Failed(
            kind="CheckpointError", message="model.safetensors is damaged"
        )
        assert process.end() == (1, "", b"")


def test_subclass_is_reported_as_the_error_that_clients_know() -> None:
    body = """
        class Odd(CheckpointError): pass
        raise Odd("no")
    """
    with child(body) as process:
        assert process.hear() == Failed(kind="CheckpointError", message="no")


def test_unexpected_exception_is_reported_with_a_traceback() -> None:
    with child("[][1]") as process:
        failed = process.hear()
        assert failed == Failed(kind="EngineError", message="IndexError: list index out of range")
        status, stderr, _ = process.end()
        assert status == 1
        assert "Traceback" in stderr
        assert "IndexError" in stderr


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (b"{}\n", "ValidationError"),
        (b"not json\n", "DecodeError"),
        (b'{"type":"Drain"}\n', "Drain"),
    ],
)
def test_wrong_first_line(first: bytes, says: str) -> None:
    with child("child.ready()", first=None) as process:
        process.write(first)
        status, stderr, stdout = process.end()
        assert status == 1
        assert stdout == b""
        assert says in stderr


@pytest.mark.parametrize("line", [b'{"type":"Quit"}\n', msgspec.json.encode(SPEC) + b"\n"])
def test_wrong_command_ends_the_process(line: bytes) -> None:
    with child(wait_for_stop()) as process:
        process.hear()
        process.write(line)
        assert process.hear().kind == "EngineError"
        assert process.end()[0] == 1


def test_reports_after_the_launcher_is_gone_are_dropped() -> None:
    with child(wait_for_stop("child.progress('too late', 0, 0)")) as process:
        process.hear()
        process.stdout.close()
        process.stdin.close()
        assert process.popen.wait(60) == 0
        assert process.popen.stderr
        assert process.popen.stderr.read() == b""


def test_what_start_up_made_is_not_collected_again():
    thresholds = gc.get_threshold()
    try:
        freeze_heap()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[2] > thresholds[2]
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
