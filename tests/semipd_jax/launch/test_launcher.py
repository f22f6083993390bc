"""The launcher and real processes; memory owner and workers are fakes without jax."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from fake_owner import BAD_SEEDS
from fake_talker import NUM_REPORTS
from launch_rig import (
    FAKES,
    TESTS,
    Client,
    concurrently,
    config,
    expected,
    unwoken_signal,
    wait_until,
)
from modelled_profile import save_profile

from benchmarks.processes import engine_processes
from semipd_jax import run_dir
from semipd_jax.config import EngineConfig, ModelConfig, ShareConfig, TunerConfig
from semipd_jax.errors import ConfigError, EngineError, StartupError, UnavailableError
from semipd_jax.launch.launcher import FrontEnd, Launcher
from semipd_jax.launch.process import Process
from semipd_jax.launch.workers import MAX_FAILED_STARTS
from semipd_jax.shares import backend as shares
from semipd_jax.tuner.profile import Sizes


def test_the_dead_that_nobody_reaped_have_no_name():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert engine_processes() == {}


@pytest.fixture
def failures() -> list[EngineError]:
    return []


@pytest.fixture
def launcher(request, failures):
    timeouts = getattr(request, "param", {})
    launcher = Launcher(config(**timeouts), modules=FAKES, on_failure=failures.append)
    launcher.start()
    yield launcher
    launcher.stop()
    assert not engine_processes()
    assert not Path(launcher.run_dir).exists()


def test_starts_named_processes_that_serve_and_leaves_nothing(launcher, failures):
    assert set(engine_processes()) == {
        "memory owner",
        "coordinator",
        "prefill worker 1.00",
        "decode worker 1.00",
    }
    assert Path(launcher.run_dir).stat().st_mode & 0o777 == 0o700
    with Client(launcher) as client:
        assert client.generate(1, max_tokens=20) == expected(1, 20)
    assert failures == []


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_killed_worker_is_replaced_and_no_token_is_lost(launcher, phase):
    with Client(launcher) as client:

        def kill_once(count):
            if count == 5:
                engine_processes()[f"{phase} worker 1.00"].kill()

        assert client.generate(1, max_tokens=30, on_token=kill_once) == expected(1, 30)
        assert client.generate(2, max_tokens=5) == expected(2, 5)


@pytest.mark.parametrize("launcher", [{"step_s": 3.0}], indirect=True, ids=["3 s"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_hung_worker_is_replaced(launcher, phase):
    with Client(launcher) as client:
        (Path(launcher.run_dir) / f"hang-{phase}").touch()
        assert client.generate(1, max_tokens=30) == expected(1, 30)


@pytest.mark.parametrize("name", ["memory owner", "coordinator"])
def test_death_of_what_cannot_be_replaced_ends_the_engine(launcher, failures, name):
    engine_processes()[name].kill()
    assert launcher.finished.wait(60)
    wait_until(lambda: failures)
    assert str(failures[0]) == f"{name} was killed by signal {signal.SIGKILL}"
    assert launcher.error is failures[0]
    assert not engine_processes()


def test_a_worker_that_cannot_start_again_ends_the_engine(launcher, failures):
    (Path(launcher.run_dir) / "die-decode").touch()
    engine_processes()["decode worker 1.00"].kill()
    assert launcher.finished.wait(60)
    wait_until(lambda: failures)
    assert f"{MAX_FAILED_STARTS}th replacement" in str(failures[0])


def test_a_phase_without_a_worker_for_too_long_ends_the_engine(launcher, failures, monkeypatch):
    monkeypatch.setattr(launcher._workers, "start_limit_s", 3.0)
    (Path(launcher.run_dir) / "sleep-decode").touch()
    engine_processes()["decode worker 1.00"].kill()
    assert launcher.finished.wait(60)
    wait_until(lambda: failures)
    assert str(failures[0]) == "no decode worker became ready in 3 s (startup_s)"
    assert not engine_processes()


def test_replacements_killed_from_outside_are_no_failed_starts(launcher, failures):
    with Client(launcher) as client:
        sleeping = Path(launcher.run_dir) / "sleep-decode"
        sleeping.touch()
        for _ in range(MAX_FAILED_STARTS + 1):
            wait_until(lambda: "decode worker 1.00" in engine_processes())
            victim = engine_processes()["decode worker 1.00"]
            victim.kill()
            wait_until(lambda victim=victim: victim not in engine_processes().values())
        sleeping.unlink()
        wait_until(lambda: "decode worker 1.00" in engine_processes())
        engine_processes()["decode worker 1.00"].kill()  # the last one that sleeps
        assert client.generate(1, max_tokens=10) == expected(1, 10)
    assert failures == []


@pytest.mark.parametrize("seed", BAD_SEEDS)
def test_the_reason_of_a_failed_start_is_raised(seed):
    bad = EngineConfig(model=ModelConfig(path="none", seed=seed))
    launcher = Launcher(bad, modules=FAKES)
    with pytest.raises(type(BAD_SEEDS[seed]), match=f"memory owner: {BAD_SEEDS[seed]}"):
        launcher.start()
    assert type(launcher.error) is type(BAD_SEEDS[seed])
    assert not engine_processes()
    assert not Path(launcher.run_dir).exists()


def test_a_profile_of_another_model_prevents_the_start(tmp_path):
    path = save_profile(tmp_path / "p.json", Sizes(weight_bytes=1 << 30, kv_bytes_per_token=1024))
    with_profile = EngineConfig(
        model=ModelConfig(path="none"), tuner=TunerConfig(policy="static", profile=path)
    )
    launcher = Launcher(with_profile, modules=FAKES)
    with pytest.raises(StartupError, match=r"the model 'demo' with 1,024\.0 MiB of weights"):
        launcher.start()
    assert not engine_processes()


def test_a_profile_that_cannot_be_read_prevents_the_start_by_its_name(tmp_path):
    absent = TunerConfig(policy="static", profile=str(tmp_path / "absent.json"))
    launcher = Launcher(EngineConfig(model=ModelConfig(path="none"), tuner=absent), modules=FAKES)
    with pytest.raises(ConfigError, match=r"tuner_profile .*absent\.json' cannot be read"):
        launcher.start()


def test_a_start_that_takes_too_long_says_who_is_missing():
    launcher = Launcher(config(startup_s=0.01), modules=FAKES)
    with pytest.raises(StartupError, match=r"memory owner, coordinator, decode worker 1\.00"):
        launcher.start()
    assert not engine_processes()


def test_stop_during_start_is_clean():
    launcher = Launcher(config(), modules=FAKES)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(launcher.start)
        wait_until(lambda: launcher.run_dir)
        launcher.stop()
        with pytest.raises(UnavailableError, match="stopped while it started"):
            starting.result(60)
    assert not engine_processes()


def test_stop_waits_for_a_start_that_has_just_begun(monkeypatch):
    begun, go_on, spawned = threading.Event(), threading.Event(), []
    create = run_dir.create

    def slow_create():
        begun.set()
        assert go_on.wait(60)
        return create()

    def spawn(module, spec, events):
        spawned.append(spec.name)
        return Process(module, spec, events)

    monkeypatch.setattr(run_dir, "create", slow_create)
    monkeypatch.setattr("semipd_jax.launch.launcher.Process", spawn)
    launcher = Launcher(config(), modules=FAKES)
    starting = concurrently(launcher.start)
    assert begun.wait(60)
    stopping = concurrently(launcher.stop)
    wait_until(lambda: launcher._stopping)
    assert not stopping.done()
    go_on.set()
    with pytest.raises(UnavailableError, match="stopped while it started"):
        starting.result(60)
    stopping.result(60)
    assert spawned == []
    assert not Path(launcher.run_dir).exists()


def is_held(directory: str) -> bool:
    """Whether this process has it open, even if it is gone."""
    held = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.append(os.readlink(link))
    return any(path.startswith(directory) for path in held)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("runs", ["never", "at once", "later"])
def test_a_start_that_ends_while_its_thread_starts_leaves_nothing(monkeypatch, kind, runs):
    start = threading.Thread.start
    threads = []

    def fail(thread):
        if thread.name != "launcher":
            return start(thread)
        if runs == "at once":
            start(thread)
        threads.append(thread)
        raise kind("while the thread starts")

    monkeypatch.setattr(threading.Thread, "start", fail)
    launcher = Launcher(config(), modules=FAKES)
    with pytest.raises(kind, match="while the thread starts"):
        launcher.start()
    concurrently(launcher.stop).result(60)
    if runs == "later":
        start(threads[0])
    if runs != "never":
        threads[0].join(60)
    assert not engine_processes()
    assert launcher.run_dir
    assert not Path(launcher.run_dir).exists()
    assert not is_held(launcher.run_dir)


def test_without_a_directory_there_is_nothing_to_stop(monkeypatch):
    def full():
        raise OSError("no space left")

    monkeypatch.setattr(run_dir, "create", full)
    launcher = Launcher(config(), modules=FAKES)
    with pytest.raises(OSError, match="no space left"):
        launcher.start()
    concurrently(launcher.stop).result(60)


def deaf(told=lambda *_: None, **timeouts):
    """A launcher whose front end does not read, and whose owner reports more than a pipe holds."""
    return Launcher(
        config(**timeouts),
        front_end=FrontEnd(module="fake_deaf"),
        modules=replace(FAKES, owner="fake_talker"),
        on_progress=told,
    )


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr("semipd_jax.launch.launcher._STOP_S", 1.0)


@pytest.mark.usefixtures("_impatient")
def test_a_start_is_given_up_in_time_though_a_process_does_not_read():
    launcher = deaf(startup_s=5.0)
    with pytest.raises(StartupError, match="still waiting for: front end, memory owner"):
        concurrently(launcher.start).result(30)
    assert not engine_processes()


@pytest.mark.usefixtures("_impatient")
def test_a_process_that_does_not_read_holds_up_neither_a_drain_nor_a_stop():
    told = []
    launcher = deaf(lambda *report: told.append(report), shutdown_s=0.5)
    starting = concurrently(launcher.start)
    wait_until(lambda: len(told) == NUM_REPORTS)
    concurrently(launcher.drain).result(30)
    concurrently(launcher.stop).result(30)
    with pytest.raises(UnavailableError, match="stopped while it started"):
        starting.result(30)
    assert not engine_processes()


def test_a_signal_that_wakes_no_thread_interrupts_a_start_and_a_stop():
    launcher = Launcher(config(), modules=replace(FAKES, owner="fake_deaf"))
    with unwoken_signal(engine_processes), pytest.raises(KeyboardInterrupt):
        launcher.start()
    with unwoken_signal(lambda: launcher._stopping), pytest.raises(KeyboardInterrupt):
        launcher.stop()
    launcher.kill()
    assert not engine_processes()


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
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not run_dir.exists() or not [p for p in run_dir.iterdir() if p.is_socket()]


def test_a_hung_coordinator_ends_the_engine(launcher, failures, monkeypatch):
    engine_processes()["coordinator"].suspend()
    monkeypatch.setattr("semipd_jax.launch.launcher.COORDINATOR_SILENCE_S", 2.0)
    assert launcher.finished.wait(60)
    wait_until(lambda: failures)
    assert re.fullmatch(r"the coordinator has been silent for \d+ s", str(failures[0]))
    assert not engine_processes()


def test_a_busy_coordinator_is_left_alone(launcher, monkeypatch):
    monkeypatch.setattr("semipd_jax.launch.launcher.COORDINATOR_SILENCE_S", 5.0)
    with Client(launcher) as client:
        assert client.generate(1, max_tokens=20) == expected(1, 20)
        assert not launcher.finished.wait(6)  # idle for longer than it may be silent
        assert client.generate(2, max_tokens=20) == expected(2, 20)


def test_a_coordinator_that_measures_for_long_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr("semipd_jax.launch.launcher.COORDINATOR_SILENCE_S", 5.0)
    modules = replace(FAKES, coordinator="semipd_jax.coordinator.profiling")
    launcher = Launcher(config(shares=ShareConfig(ladder=(0.5,))), modules=modules)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(launcher.start)
        wait_until(lambda: launcher.run_dir)
        for lane in ("prefill", "decode"):  # so that it waits for workers
            (Path(launcher.run_dir) / f"sleep-{lane}").touch()
        wait_until(lambda: "decode worker 1.00" in engine_processes())
        assert not launcher.finished.wait(7)
        launcher.stop()
        with pytest.raises(UnavailableError, match="stopped while it started"):
            starting.result(60)


@contextlib.contextmanager
def a_host_that_fails(*_):
    yield {}
    raise RuntimeError("the daemon does not quit")


def test_a_failure_at_the_end_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(shares, "host", a_host_that_fails)
    launcher = Launcher(config(), modules=FAKES)
    launcher.start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(launcher.stop).result(60)
    assert not engine_processes()
    assert not Path(launcher.run_dir).exists()


def test_stop_from_a_progress_report():
    def report(name, progress):
        launcher.stop()

    launcher = Launcher(config(), modules=FAKES, on_progress=report)
    with pytest.raises(UnavailableError, match="stopped while it started"):
        launcher.start()
    assert launcher.finished.is_set()
    assert not engine_processes()


def test_a_launcher_that_was_stopped_itself_finds_no_fault(launcher, failures, monkeypatch):
    """As when a debugger held it: a minute has gone by that it did not see."""
    asleep = SimpleNamespace(monotonic=lambda: time.monotonic() + 60.0)
    monkeypatch.setattr("semipd_jax.launch.launcher.time", asleep)
    assert not launcher.finished.wait(3)
    assert failures == []
