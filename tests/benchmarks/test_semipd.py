"""The parts that talk to this project's own processes."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import control_plane
from benchmarks.load import run_load
from benchmarks.semipd import sender, wait_until_ready
from benchmarks.workload import fixed
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
