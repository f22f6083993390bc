"""The launcher and real processes; memory owner and workers are fakes without jax."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake_device import next_token

from semipd_jax.config import EngineConfig, ModelConfig, TimeoutConfig
from semipd_jax.errors import CheckpointError, EngineError, StartupError, UnavailableError
from semipd_jax.launch.launcher import MAX_FAILED_STARTS, Launcher, Modules
from semipd_jax.messages import FromCoordinator, Outputs, Submit, ToCoordinator
from semipd_jax.request import Request, SamplingParams
from semipd_jax.transport.channels import CLIENTS, Link

FAKES = Modules(owner="fake_owner", worker="fake_worker")
TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fakes_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def config(**timeouts: float) -> EngineConfig:
    times = {"startup_s": 30.0, "step_s": 60.0, **timeouts}
    return EngineConfig(model=ModelConfig(path="none"), timeouts=TimeoutConfig(**times))


def children() -> dict[str, psutil.Process]:
    """This process's children by the name they gave themselves."""
    found = {}
    for process in psutil.Process().children():
        title = " ".join(process.cmdline()).strip()
        if title.startswith("semipd: "):
            found[title.removeprefix("semipd: ")] = process
    return found


def wait_until(condition, *, timeout_s: float = 20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


class Client:
    def __init__(self, launcher: Launcher) -> None:
        self._link = Link[FromCoordinator, ToCoordinator](
            launcher.run_dir, CLIENTS, "test", FromCoordinator
        )

    def generate(self, handle: int, *, max_tokens: int, on_token=lambda n: None) -> list[int]:
        prompt = (5, 6, handle)
        sampling = SamplingParams(max_tokens=max_tokens, seed=handle)
        request = Request(request_id=str(handle), prompt_token_ids=prompt, sampling=sampling)
        self._link.send(Submit(handle, request))
        tokens: list[int] = []
        while True:
            message = self._link.receive(20.0)
            assert message is not None, "no answer"
            if isinstance(message, Outputs):
                new = np.frombuffer(message.token_ids, np.int32).tolist()
                tokens += new
                if new:
                    on_token(len(tokens))
                if message.done:
                    assert message.done[0].error is None
                    return tokens

    def close(self) -> None:
        self._link.close()


def expected(handle: int, max_tokens: int) -> list[int]:
    output: list[int] = []
    while len(output) < max_tokens:
        output.append(next_token([5, 6, handle, *output], handle))
    return output


@pytest.fixture
def failures() -> list[EngineError]:
    return []


@pytest.fixture
def launcher(failures):
    launcher = Launcher(config(step_s=2.0), modules=FAKES, on_failure=failures.append)
    launcher.start()
    yield launcher
    launcher.stop()
    assert not children()
    assert not Path(launcher.run_dir).exists()


def test_starts_named_processes_that_serve_and_leaves_nothing(launcher, failures):
    assert set(children()) == {
        "memory owner",
        "coordinator",
        "prefill worker 1.00",
        "decode worker 1.00",
    }
    assert Path(launcher.run_dir).stat().st_mode & 0o777 == 0o700
    client = Client(launcher)
    assert client.generate(1, max_tokens=20) == expected(1, 20)
    client.close()
    assert failures == []


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_killed_worker_is_replaced_and_no_token_is_lost(launcher, phase):
    client = Client(launcher)

    def kill_once(count):
        if count == 5:
            children()[f"{phase} worker 1.00"].kill()

    assert client.generate(1, max_tokens=30, on_token=kill_once) == expected(1, 30)
    assert client.generate(2, max_tokens=5) == expected(2, 5)
    client.close()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_hung_worker_is_replaced(launcher, phase):
    client = Client(launcher)
    (Path(launcher.run_dir) / f"hang-{phase}").touch()
    assert client.generate(1, max_tokens=30) == expected(1, 30)
    client.close()


@pytest.mark.parametrize("name", ["memory owner", "coordinator"])
def test_death_of_what_cannot_be_replaced_ends_the_engine(launcher, failures, name):
    children()[name].kill()
    assert launcher.finished.wait(10)
    wait_until(lambda: failures)
    assert str(failures[0]) == f"{name} was killed by signal {signal.SIGKILL}"
    assert launcher.error is failures[0]
    assert not children()


def test_a_worker_that_cannot_start_again_ends_the_engine(launcher, failures):
    (Path(launcher.run_dir) / "die-decode").touch()
    children()["decode worker 1.00"].kill()
    assert launcher.finished.wait(20)
    wait_until(lambda: failures)
    assert f"{MAX_FAILED_STARTS}th replacement" in str(failures[0])


def test_a_phase_without_a_worker_for_too_long_ends_the_engine(failures):
    launcher = Launcher(config(startup_s=6.0), modules=FAKES, on_failure=failures.append)
    launcher.start()
    (Path(launcher.run_dir) / "sleep-decode").touch()
    children()["decode worker 1.00"].kill()
    assert launcher.finished.wait(30)
    wait_until(lambda: failures)
    assert str(failures[0]) == "no decode worker became ready in 6 s (startup_s)"
    assert not children()


def test_replacements_killed_from_outside_are_no_failed_starts(launcher, failures):
    client = Client(launcher)
    sleeping = Path(launcher.run_dir) / "sleep-decode"
    sleeping.touch()
    for _ in range(MAX_FAILED_STARTS + 1):
        wait_until(lambda: "decode worker 1.00" in children())
        victim = children()["decode worker 1.00"]
        victim.kill()
        psutil.wait_procs([victim], timeout=10)
    sleeping.unlink()
    wait_until(lambda: "decode worker 1.00" in children())
    children()["decode worker 1.00"].kill()  # the last one that sleeps
    assert client.generate(1, max_tokens=10) == expected(1, 10)
    client.close()
    assert failures == []


def test_the_reason_of_a_failed_start_is_raised():
    bad = EngineConfig(model=ModelConfig(path="none", seed=13))
    launcher = Launcher(bad, modules=FAKES)
    with pytest.raises(CheckpointError, match=r"memory owner: model\.safetensors is damaged"):
        launcher.start()
    assert not children()
    assert not Path(launcher.run_dir).exists()


def test_a_start_that_takes_too_long_says_who_is_missing():
    launcher = Launcher(config(startup_s=0.01), modules=FAKES)
    with pytest.raises(StartupError, match=r"memory owner, coordinator, prefill worker 1\.00"):
        launcher.start()
    assert not children()


def test_stop_during_start_is_clean():
    launcher = Launcher(config(), modules=FAKES)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(launcher.start)
        wait_until(lambda: launcher.run_dir)
        launcher.stop()
        with pytest.raises(UnavailableError, match="stopped while it started"):
            starting.result(20)
    assert not children()


def test_children_follow_a_launcher_that_was_killed():
    code = """
import sys, time
sys.path.insert(0, sys.argv[1])
from semipd_jax.launch.launcher import Launcher, Modules
from semipd_jax.config import EngineConfig, ModelConfig
launcher = Launcher(EngineConfig(model=ModelConfig(path="none")),
                    modules=Modules(owner="fake_owner", worker="fake_worker"))
launcher.start()
print("up", launcher.run_dir, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(TESTS)], stdout=subprocess.PIPE, text=True
    ) as launching:
        assert launching.stdout is not None
        run_dir = Path(launching.stdout.readline().split()[1])
        family = psutil.Process(launching.pid).children(recursive=True)
        assert len(family) == 4
        os.kill(launching.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not run_dir.exists() or not [p for p in run_dir.iterdir() if p.is_socket()]
