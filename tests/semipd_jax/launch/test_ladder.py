"""Workers at several shares: which processes there are, and what their deaths do."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_rig import FAKES, Client, children, config, expected, wait_until

from semipd_jax.config import ShareConfig
from semipd_jax.errors import EngineError
from semipd_jax.launch.launcher import Launcher

LADDER = ShareConfig(prefill=1.0, decode=0.5, decode_ladder=(1.0,))


@pytest.fixture
def failures() -> list[EngineError]:
    return []


@pytest.fixture
def launcher(failures) -> Iterator[Launcher]:
    launcher = Launcher(config(shares=LADDER), modules=FAKES, on_failure=failures.append)
    launcher.start()
    yield launcher
    launcher.stop()
    assert not children()
    assert failures == []


@pytest.fixture
def client(launcher) -> Iterator[Client]:
    client = Client(launcher)
    yield client
    client.close()


def workers() -> set[str]:
    return {name for name in children() if "worker" in name}


RUNGS = {"prefill worker 1.00", "decode worker 0.50", "decode worker 1.00"}


def test_every_rung_has_a_warm_worker_from_the_start(client):
    assert workers() == RUNGS
    # The launcher may hear of a worker's readiness a moment before the coordinator does.
    wait_until(lambda: client.shares().prefill.warm == (1.0,))
    wait_until(lambda: client.shares().decode.warm == (0.5, 1.0))
    report = client.shares()
    assert (report.prefill.asked, report.decode.asked) == (1.0, 0.5)
    assert client.generate(1, max_tokens=20) == expected(1, 20)


def test_a_share_beside_the_ladder_gets_a_worker_that_leaves_with_it(client):
    client.shares(decode=0.7)
    wait_until(lambda: 0.7 in client.shares().decode.warm)
    assert workers() == RUNGS | {"decode worker 0.70"}
    assert client.generate(1, max_tokens=20) == expected(1, 20)
    client.shares(decode=0.5)
    wait_until(lambda: workers() == RUNGS)
    client.shares(decode=0.7)
    wait_until(lambda: 0.7 in client.shares().decode.warm)
    children()["decode worker 0.70"].kill()
    wait_until(lambda: client.shares().decode.warm == (0.5, 1.0))
    wait_until(lambda: client.shares().decode.warm == (0.5, 0.7, 1.0))


def test_a_share_whose_worker_cannot_start_is_given_up(launcher, client):
    (Path(launcher.run_dir) / "die-decode").touch()
    client.shares(decode=0.7)
    wait_until(lambda: client.shares().decode.asked != 0.7)
    assert client.shares().decode.warm == (0.5, 1.0)
    assert client.generate(1, max_tokens=20) == expected(1, 20)


def test_a_rung_that_dies_comes_back(client):
    children()["decode worker 1.00"].kill()
    wait_until(lambda: client.shares().decode.warm == (0.5,))
    assert client.generate(1, max_tokens=20) == expected(1, 20)
    wait_until(lambda: client.shares().decode.warm == (0.5, 1.0))


def test_a_phase_runs_on_while_another_of_its_rungs_is_away_for_long(failures):
    launcher = Launcher(
        config(shares=LADDER, startup_s=4.0), modules=FAKES, on_failure=failures.append
    )
    launcher.start()
    try:
        (Path(launcher.run_dir) / "sleep-decode").touch()
        children()["decode worker 1.00"].kill()
        assert not launcher.finished.wait(6.0)
        client = Client(launcher)
        assert client.generate(1, max_tokens=20) == expected(1, 20)
        client.close()
    finally:
        launcher.stop()
    assert failures == []
