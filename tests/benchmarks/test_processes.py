import os
import subprocess

from benchmarks.processes import cpu_seconds, engine_processes

NAME = "decode worker 600"


def test_a_process_that_ended_and_was_not_reaped_is_none() -> None:
    command = ["semipd: decode worker", "600"]
    with subprocess.Popen(command, executable="/bin/sleep") as child:
        assert engine_processes()[NAME].pid == child.pid
        assert f"semipd: {NAME}" in cpu_seconds("own")
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert NAME not in engine_processes()
        assert f"semipd: {NAME}" not in cpu_seconds("own")
