"""What the runs of others' clients leave behind."""

from pathlib import Path

import psutil
import pytest
from launch_rig import wait_until

from benchmarks.conformance import clients

DEAF = """#!/bin/sh
trap '' TERM
echo $$
exec sleep 60
"""
"""What it ignores, the program in its place does, too."""


def test_a_gateway_that_does_not_stop_is_ended_and_hides_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, log = tmp_path / "smg", tmp_path / "smg.log"
    gateway.write_text(DEAF)
    gateway.chmod(0o700)
    monkeypatch.setattr(clients, "_GATEWAY_STOP_S", 0.1)

    def fail(*_: object) -> None:
        wait_until(lambda: log.read_text().endswith("\n"))
        raise RuntimeError("the gateway does not offer it")

    monkeypatch.setattr(clients, "_wait_for_model", fail)
    server = clients.Server(grpc="127.0.0.1:1", http="", model="tiny", tokenizer="")
    with pytest.raises(RuntimeError, match="does not offer"):
        clients.run_smg(server, tmp_path, tmp_path)
    assert not psutil.pid_exists(int(log.read_text()))
