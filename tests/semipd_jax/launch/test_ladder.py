"""Workers at several shares: which processes there are, and what their deaths do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from launch_rig import FAKES, Client, config, expected, wait_until

from benchmarks.processes import engine_processes
from semipd_jax.config import ShareConfig
from semipd_jax.errors import EngineError
from semipd_jax.launch.launcher import Launcher
from semipd_jax.messages import RetireWorker
from semipd_jax.shares import backend as shares

LADDER = ShareConfig(prefill=1.0, decode=0.5, decode_ladder=(1.0,))


@pytest.fixture
def failures() -> list[EngineError]:
    return []


@pytest.fixture
def launcher(request, failures) -> Iterator[Launcher]:
    timeouts = getattr(request, "param", {})
    launcher = Launcher(
        config(shares=LADDER, **timeouts), modules=FAKES, on_failure=failures.append
    )
    launcher.start()
    yield launcher
    launcher.stop()
    assert not engine_processes()
    assert failures == []


@pytest.fixture
def client(launcher) -> Iterator[Client]:
    with Client(launcher) as client:
        yield client


def workers() -> set[str]:
    return {name for name in engine_processes() if "worker" in name}


def pids() -> dict[str, int]:
    return {name: process.pid for name, process in engine_processes().items() if "worker" in name}


@contextmanager
def without(launcher: Launcher, name: str) -> Iterator[None]:
    """Kills a decode worker; inside, its replacements do not become ready."""
    sleep = Path(launcher.run_dir) / "sleep-decode"
    sleep.touch()
    engine_processes()[name].kill()
    yield
    sleep.unlink()
    wait_until(lambda: name in engine_processes())
    engine_processes()[name].kill()  # it sleeps


RUNGS = {"prefill worker 1.00", "decode worker 0.50", "decode worker 1.00"}


def renewed(before: dict[str, int]) -> set[str]:
    """The workers that are new processes; none while any is missing."""
    now = pids()
    return {name for name in RUNGS if now[name] != before[name]} if now.keys() == RUNGS else set()


def test_every_rung_has_a_warm_worker_from_the_start(client):
    assert workers() == RUNGS
    # The launcher may hear of a worker's readiness a moment before the coordinator does.
    wait_until(lambda: client.shares().prefill.warm == (1.0,))
    wait_until(lambda: client.shares().decode.warm == (0.5, 1.0))
    report = client.shares()
    assert (report.prefill.asked, report.decode.asked) == (1.0, 0.5)
    assert client.generate(1, max_tokens=20) == expected(1, 20)


def test_a_share_beside_the_ladder_gets_a_worker_that_leaves_with_it(launcher, client):
    client.shares(decode=0.7)
    wait_until(lambda: 0.7 in client.shares().decode.warm)
    assert workers() == RUNGS | {"decode worker 0.70"}
    assert client.generate(1, max_tokens=20) == expected(1, 20)
    client.shares(decode=0.5)
    wait_until(lambda: workers() == RUNGS)
    client.shares(decode=0.7)
    wait_until(lambda: 0.7 in client.shares().decode.warm)
    with without(launcher, "decode worker 0.70"):
        wait_until(lambda: client.shares().decode.warm == (0.5, 1.0))
    wait_until(lambda: client.shares().decode.warm == (0.5, 0.7, 1.0))


def test_of_shares_asked_for_in_a_row_only_the_last_gets_a_worker(launcher, client):
    gate = Path(launcher.run_dir) / "sleep-decode"
    gate.touch()
    client.shares(decode=0.6)
    wait_until(lambda: "decode worker 0.60" in workers())
    for share in (0.7, 0.75, 0.8):
        client.shares(decode=share)
    assert workers() == RUNGS | {"decode worker 0.60"}
    gate.unlink()
    engine_processes()["decode worker 0.60"].kill()  # it sleeps
    wait_until(lambda: client.shares().decode.warm == (0.5, 0.8, 1.0))
    wait_until(lambda: workers() == RUNGS | {"decode worker 0.80"})


def test_a_share_whose_worker_cannot_start_is_given_up(launcher, client):
    (Path(launcher.run_dir) / "die-decode").touch()
    client.shares(decode=0.7)
    wait_until(lambda: client.shares().decode.asked != 0.7)
    wait_until(lambda: client.shares().decode.warm == (0.5, 1.0))
    assert client.generate(1, max_tokens=20) == expected(1, 20)


def test_a_share_whose_worker_does_not_get_ready_in_time_is_given_up(launcher, client, monkeypatch):
    (Path(launcher.run_dir) / "sleep-decode").touch()
    client.shares(decode=0.7)
    wait_until(lambda: "decode worker 0.70" in engine_processes())
    monkeypatch.setattr(launcher._workers, "start_limit_s", 1.0)
    wait_until(lambda: client.shares().decode.asked != 0.7)
    wait_until(lambda: workers() == RUNGS)
    assert client.generate(1, max_tokens=20) == expected(1, 20)


def test_a_rung_that_dies_comes_back(launcher, client):
    with without(launcher, "decode worker 1.00"):
        wait_until(lambda: client.shares().decode.warm == (0.5,))
        assert client.generate(1, max_tokens=20) == expected(1, 20)
    wait_until(lambda: client.shares().decode.warm == (0.5, 1.0))


def test_a_phase_runs_on_while_another_of_its_rungs_is_away_for_long(launcher, client, monkeypatch):
    monkeypatch.setattr(launcher._workers, "start_limit_s", 2.0)
    (Path(launcher.run_dir) / "sleep-decode").touch()
    engine_processes()["decode worker 1.00"].kill()
    assert not launcher.finished.wait(4.0)
    assert client.generate(1, max_tokens=20) == expected(1, 20)


@pytest.fixture
def evicted(monkeypatch) -> list[int]:
    """Process ids that were taken off the device, each while it was still there."""
    pids: list[int] = []

    def evict(platform, pid, terms):
        if pid in pids:
            return
        assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        pids.append(pid)

    monkeypatch.setattr(shares, "evict", evict)
    return pids


@pytest.mark.parametrize("launcher", [{"step_s": 10.0}], indirect=True, ids=["10 s"])
def test_a_hung_worker_is_taken_off_the_device_before_it_is_killed(launcher, client, evicted):
    before = pids()
    (Path(launcher.run_dir) / "hang-decode").touch()
    assert client.generate(1, max_tokens=30) == expected(1, 30)
    wait_until(lambda: renewed(before))
    assert evicted == [before[name] for name in renewed(before)]
    assert len(evicted) == 1


def test_a_retired_worker_drains_and_leaves_by_itself(launcher, client, evicted, monkeypatch):
    monkeypatch.setattr("semipd_jax.launch.workers.LEAVE_S", 60.0)
    client.shares(decode=0.7)
    wait_until(lambda: 0.7 in client.shares().decode.warm)
    client.shares(decode=0.5)
    wait_until(lambda: workers() == RUNGS)
    assert evicted == []


def test_a_retired_worker_that_does_not_leave_is_evicted(launcher, client, evicted, monkeypatch):
    client.shares(decode=0.7)
    wait_until(lambda: 0.7 in client.shares().decode.warm)
    retired = engine_processes()["decode worker 0.70"].pid
    stay = Path(launcher.run_dir) / "stay-decode"
    stay.touch()
    with monkeypatch.context() as patch:
        patch.setattr("semipd_jax.launch.workers.LEAVE_S", 0.5)
        client.shares(decode=0.5)
        wait_until(lambda: workers() == RUNGS)
    assert evicted == [retired]
    assert client.generate(1, max_tokens=20) == expected(1, 20)
    stay.unlink()


@pytest.fixture
def fate_is_shared(monkeypatch) -> None:
    """As of MPS clients: the fault of one leaves the others there, but useless. Who stays may."""
    monkeypatch.setattr(shares, "is_fate_shared", lambda platform, terms: True)
    monkeypatch.setattr("semipd_jax.launch.workers.LEAVE_S", 60.0)


@pytest.mark.usefixtures("fate_is_shared")
def test_all_workers_are_replaced_when_a_fault_of_one_is_a_fault_of_all(launcher, client):
    before = pids()
    (Path(launcher.run_dir) / "fail-decode").touch()
    assert client.generate(1, max_tokens=30) == expected(1, 30)
    wait_until(lambda: renewed(before) == RUNGS)


@pytest.mark.usefixtures("fate_is_shared")
def test_new_workers_wait_until_the_last_of_a_common_fault_has_left(launcher, client):
    stay = Path(launcher.run_dir) / "stay-prefill"
    stay.touch()
    left = engine_processes()["prefill worker 1.00"]
    (Path(launcher.run_dir) / "fail-decode").touch()
    wait_until(lambda: workers() == {"prefill worker 1.00"})
    assert engine_processes()["prefill worker 1.00"] == left
    stay.unlink()
    wait_until(lambda: workers() == RUNGS)
    assert engine_processes()["prefill worker 1.00"] != left
    assert client.generate(1, max_tokens=20) == expected(1, 20)


@pytest.mark.usefixtures("fate_is_shared")
def test_new_workers_wait_for_retired_ones_too(launcher, client):
    client.shares(decode=0.7)
    wait_until(lambda: 0.7 in client.shares().decode.warm)
    stay = Path(launcher.run_dir) / "stay-decode"
    stay.touch()
    client.shares(decode=0.5)
    (Path(launcher.run_dir) / "fail-prefill").touch()
    wait_until(lambda: launcher._workers._due)  # the launcher has heard of the fault
    for name in ("decode worker 0.50", "decode worker 1.00"):
        engine_processes()[name].kill()
    wait_until(lambda: workers() == {"decode worker 0.70"})
    assert not launcher.finished.wait(1.0)
    assert workers() == {"decode worker 0.70"}
    stay.unlink()
    wait_until(lambda: workers() == RUNGS)
    assert client.generate(1, max_tokens=20) == expected(1, 20)


@pytest.mark.usefixtures("fate_is_shared")
def test_a_share_that_is_given_up_while_workers_wait_gets_none(launcher, client):
    client.shares(decode=0.7)
    wait_until(lambda: 0.7 in client.shares().decode.warm)
    [extra] = [slot for slot in launcher._workers.slots if slot.share == 0.7]
    stay = Path(launcher.run_dir) / "stay-prefill"
    stay.touch()
    (Path(launcher.run_dir) / "fail-decode").touch()
    wait_until(lambda: workers() == {"prefill worker 1.00"})
    retire = RetireWorker(worker_id=extra.worker_id)  # sent before its loss was known
    launcher._events.put((launcher._coordinator, retire))
    client.shares(decode=0.5)
    stay.unlink()
    wait_until(lambda: workers() == RUNGS)
    assert client.generate(1, max_tokens=20) == expected(1, 20)


def test_a_fault_elsewhere_leaves_the_other_workers_alone(launcher, client):
    before = pids()
    (Path(launcher.run_dir) / "fail-decode").touch()
    assert client.generate(1, max_tokens=30) == expected(1, 30)
    wait_until(lambda: renewed(before))
    assert len(renewed(before)) == 1


def test_workers_killed_all_at_once_come_back(launcher, client):
    for name in RUNGS:
        engine_processes()[name].kill()
    assert client.generate(1, max_tokens=30) == expected(1, 30)
    wait_until(lambda: workers() == RUNGS)
