"""The parts that talk to this project's own processes."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks import control_plane
from benchmarks.load import run_load
from benchmarks.semipd import sender, wait_until_ready
from benchmarks.workload import fixed
from semipd_jax.demo import MODEL_DIR
from semipd_server.client import AsyncClient


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nothing listens, nor will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_failures_have_the_name_of_their_grpc_status(nobody: str) -> None:
    async def load() -> list[str]:
        planned = fixed([0.0, 0.0], input_len=4, output_len=4, vocab_size=10, seed=0)
        async with AsyncClient(nobody) as client:
            done = await run_load(planned, sender(client), request_timeout_s=30)
        return [record.status for record in done.records]

    assert asyncio.run(load()) == ["UNAVAILABLE", "UNAVAILABLE"]


def test_waiting_for_a_server_ends(nobody: str) -> None:
    with pytest.raises(TimeoutError, match=nobody):
        wait_until_ready(nobody, timeout_s=0.0)


_PROGRAM = """
import signal, sys
from benchmarks.semipd import running_server
small = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
with running_server(sys.argv[1], small, timeout_s=120):
    print("ready", flush=True)
    signal.pause()
"""


@pytest.mark.slow
def test_a_benchmark_that_is_terminated_leaves_no_server() -> None:
    command = [sys.executable, "-c", _PROGRAM, str(MODEL_DIR)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            while program.stdout.readline().strip() != "ready":
                assert program.poll() is None
            family = psutil.Process(program.pid).children(recursive=True)
            program.terminate()
            assert program.wait(120) == 128 + signal.SIGTERM
        finally:
            program.kill()
        alive = psutil.wait_procs(family, timeout=60)[1]
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.slow
def test_control_plane_measures_real_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(control_plane, "_STEPS", 5)
    output = tmp_path / "result.json"
    flags = ["--streams", "4", "--output-len", "16", "--repeat", "2"]
    control_plane.main([*flags, "--json", str(output)])
    result = json.loads(output.read_text())
    assert result["coordinator_step_ms"]["256"]["count"] == 5
    runs = [*result["at once"], *result["paced"]]
    assert len(runs) == 4
    for run in runs:
        assert run["tokens_per_s"] > 0
        assert run["tokens_per_message"] >= 1
        assert {"client", "semipd: coordinator", "semipd: front end"} <= set(
            run["cpu_us_per_token"]
        )
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
