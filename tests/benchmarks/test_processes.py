import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from launch_rig import wait_until

from benchmarks.processes import cpu_seconds, engine_processes

NAME = "decode worker 600"


def test_a_process_that_ended_and_was_not_reaped_is_none() -> None:
    with process_called_like_a_worker() as child:
        assert engine_processes()[NAME].pid == child.pid
        assert f"semipd: {NAME}" in cpu_seconds("own")
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert NAME not in engine_processes()
        assert f"semipd: {NAME}" not in cpu_seconds("own")


@contextmanager
def process_called_like_a_worker() -> Iterator[subprocess.Popen[bytes]]:
    command = ["semipd: decode worker", "600"]
    with subprocess.Popen(command, executable="/bin/sleep") as child:
        try:
            wait_until(lambda: NAME in engine_processes())  # Popen returns before exec has ended
            yield child
        finally:
            child.kill()
