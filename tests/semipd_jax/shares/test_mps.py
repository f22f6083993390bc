"""SM shares, against a control daemon that is a shell script (`fake_mps_control.sh`)."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cuda_driver import FakeDriver

from semipd_jax.config import ShareConfig
from semipd_jax.errors import StartupError
from semipd_jax.shares import backend, mps
from semipd_jax.shares.mps import CONTROL, Control, SmGrant, percentage

TESTS = Path(__file__).parents[2]
SHARES = ShareConfig(prefill=0.6, decode=0.8)


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return str(directory)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of what the daemon knows. Nothing of a real one is in the environment."""
    programs, state = tmp_path / "bin", tmp_path / "mps"
    programs.mkdir()
    state.mkdir()
    shutil.copy(TESTS / "fake_mps_control.sh", programs / CONTROL)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_MPS", str(state))
    for name in list(os.environ):
        if name.startswith("CUDA_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(mps, "_DEFAULT_PIPE_DIRECTORY", str(tmp_path / "nvidia-mps"))
    return state


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    driver.install(monkeypatch)
    return driver


def commands(fake: Path) -> list[str]:
    path = fake / "commands"
    return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []


def connect(fake: Path, *pids: int, server: int = 77) -> None:
    (fake / "servers").write_text(f"{server}\n")
    (fake / f"clients-{server}").write_text("".join(f"{pid}\n" for pid in pids))


def start_daemon(pipe: Path, pid: int) -> None:
    """A daemon that somebody else started."""
    pipe.mkdir()
    (pipe / f"{CONTROL}.pid").write_text(f"{pid}\n")


# ---------------------------------------------------------------- the daemon


def test_private_daemon_has_its_own_directories_and_ends_with_the_context(
    fake: Path, run_dir: str
) -> None:
    with mps.host(SHARES, run_dir, 132) as terms:
        assert terms == {
            "mps": "auto",
            "mps_pipe_directory": f"{run_dir}/mps",
            "mps_log_directory": f"{run_dir}/mps-log",
            "num_sms": "132",
        }
        for name in ("mps", "mps-log"):
            assert (Path(run_dir) / name).stat().st_mode & 0o777 == 0o700
        assert commands(fake) == ["get_server_list"]  # it answers
    assert commands(fake)[-1] == "quit"
    assert not (Path(run_dir) / "mps" / f"{CONTROL}.pid").exists()


def test_daemon_inherits_no_limits_and_no_device_order(
    fake: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "10")
    monkeypatch.setenv("CUDA_MPS_PROTOCOL_VERSION", "3")
    with mps.host(SHARES, run_dir, 132):
        seen = dict(line.split("=", 1) for line in (fake / "environment").read_text().splitlines())
    assert {name: value for name, value in seen.items() if name.startswith("CUDA_")} == {
        "CUDA_MPS_PIPE_DIRECTORY": f"{run_dir}/mps",
        "CUDA_MPS_LOG_DIRECTORY": f"{run_dir}/mps-log",
    }


def test_a_program_that_cannot_be_run_is_a_reason(fake: Path, run_dir: str) -> None:
    (fake.parent / "bin" / CONTROL).chmod(0o600)
    with pytest.raises(StartupError, match="cannot be run"):
        Control(run_dir, run_dir).servers()


def test_daemon_does_not_outlive_a_killed_launcher(fake: Path, run_dir: str) -> None:
    script = """
        import sys, time
        from semipd_jax.shares.mps import private_daemon
        with private_daemon(sys.argv[1]):
            print("up", flush=True)
            time.sleep(60)
    """
    argv = [sys.executable, "-c", textwrap.dedent(script), run_dir]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        assert launcher.stdout.readline() == "up\n"
        launcher.send_signal(signal.SIGKILL)
        launcher.wait(60)
    pid_file = Path(run_dir) / "mps" / f"{CONTROL}.pid"
    deadline = time.monotonic() + 60
    while pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_daemon_ends_also_if_what_it_was_for_fails(fake: Path, run_dir: str) -> None:
    with pytest.raises(ZeroDivisionError), mps.host(SHARES, run_dir, 132):
        raise ZeroDivisionError
    assert commands(fake)[-1] == "quit"


def test_daemon_that_does_not_start(
    fake: Path, run_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    (fake / "broken").write_text("An instance of this daemon is already running\n")
    reason = "An instance of this daemon is already running; the log says why"
    with mps.host(SHARES, run_dir, 132) as terms:
        assert terms["mps"] == "off"
        assert not os.path.exists(terms["mps_pipe_directory"])
    assert [reason in record.message for record in caplog.records] == [True]
    os.rmdir(f"{run_dir}/mps")
    shutil.rmtree(f"{run_dir}/mps-log")
    with (
        pytest.raises(StartupError, match=f"mps is 'on', but: .*{reason}"),
        mps.host(replace(SHARES, mps="on"), run_dir, 132),
    ):
        pass


def test_machine_without_mps(
    fake: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with mps.host(SHARES, run_dir, 132) as terms:
        assert terms["mps"] == "off"
    assert "processes take turns: nvidia-cuda-mps-control is not on PATH" in caplog.text


def test_off_is_no_surprise(fake: Path, run_dir: str, caplog: pytest.LogCaptureFixture) -> None:
    with mps.host(replace(SHARES, mps="off"), run_dir, 132) as terms:
        assert terms["mps"] == "off"
    assert "SM shares are not kept: mps is 'off'" in caplog.text
    caplog.clear()
    with mps.host(ShareConfig(mps="off"), run_dir, 132):
        pass
    assert caplog.text == ""
    assert commands(fake) == []


def test_path_of_sockets_must_fit(fake: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    with (
        pytest.raises(StartupError, match=r"longer than 107: .*; set TMPDIR"),
        mps.private_daemon(str(deep)),
    ):
        pass
    assert list(deep.iterdir()) == []


# ---------------------------------------------------------------- a daemon that runs already


def test_daemon_that_the_environment_names_is_used_and_left_running(
    fake: Path, run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_daemon(tmp_path / "theirs", 1)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "theirs"))
    with mps.host(SHARES, run_dir, 132) as terms:
        assert terms["mps_pipe_directory"] == str(tmp_path / "theirs")
    assert "quit" not in commands(fake)
    assert os.listdir(run_dir) == []


@pytest.mark.parametrize("is_ours", [True, False])
def test_daemon_in_the_usual_place_is_used_if_it_serves_this_user(
    fake: Path, run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ours: bool
) -> None:
    start_daemon(tmp_path / "nvidia-mps", os.getpid())
    if not is_ours:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        monkeypatch.setattr(mps, "_uid_of", lambda pid: 54321)
    with mps.host(SHARES, run_dir, 132) as terms:
        usual = terms["mps_pipe_directory"] == str(tmp_path / "nvidia-mps")
    assert usual == is_ours
    assert (commands(fake)[-1] == "quit") != is_ours


def test_daemon_without_room_for_our_workers_is_refused_before_one_starts(
    fake: Path, run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_daemon(tmp_path / "theirs", 1)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "theirs"))
    ours = SHARES.max_num_workers
    connect(fake, *range(1000, 1000 + 48 - ours))
    with mps.host(replace(SHARES, mps="on"), run_dir, 132):
        pass
    connect(fake, *range(1000, 1000 + 48 - ours + 1))
    with (
        pytest.raises(StartupError, match=f"has 45 clients; with up to {ours} workers of ours"),
        mps.host(replace(SHARES, mps="on"), run_dir, 132),
    ):
        pass


def test_clients_of_a_daemon_share_their_fate() -> None:
    assert backend.is_fate_shared("cuda", terms("on"))
    assert not backend.is_fate_shared("cuda", terms("off"))
    assert not backend.is_fate_shared("cpu", {})


def test_directory_that_a_dead_daemon_left_is_not_used(
    fake: Path, run_dir: str, tmp_path: Path
) -> None:
    (tmp_path / "nvidia-mps").mkdir()
    with mps.host(SHARES, run_dir, 132) as terms:
        assert terms["mps_pipe_directory"] == f"{run_dir}/mps"


# ---------------------------------------------------------------- workers


@pytest.mark.parametrize(
    ("share", "percent"), [(1.0, 100), (0.6, 60), (0.07, 7), (0.333, 33), (0.001, 1)]
)
def test_percentage(share: float, percent: int) -> None:
    assert percentage(share) == percent


def terms(mode: str = "on", num_sms: int = 132) -> dict[str, str]:
    return {
        "mps": mode,
        "mps_pipe_directory": "/run/mps",
        "mps_log_directory": "/run/mps-log",
        "num_sms": str(num_sms),
    }


def test_a_worker_becomes_a_client_with_a_percentage(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"CUDA_MPS_SM_PARTITION": "x", "HOME": "/h"})
    grant = backend.apply("cuda", 0.6, "prefill", terms())
    assert os.environ == {
        "HOME": "/h",
        "CUDA_MPS_PIPE_DIRECTORY": "/run/mps",
        "CUDA_MPS_LOG_DIRECTORY": "/run/mps-log",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "60",
    }
    assert isinstance(grant, backend.Grant)


def test_without_mps_a_worker_finds_no_daemon(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "10"})
    backend.apply("cuda", 0.6, "prefill", terms("off"))
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in os.environ
    assert not os.path.exists(os.environ["CUDA_MPS_PIPE_DIRECTORY"])


def test_the_memory_owner_is_no_client(
    fake: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"CUDA_MPS_PIPE_DIRECTORY": "/theirs"})
    backend.abstain("cuda", run_dir)
    assert not os.path.exists(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"].startswith(run_dir)


@pytest.fixture
def daemon(fake: Path, tmp_path: Path) -> Control:
    start_daemon(tmp_path / "pipe", os.getpid())
    return Control(str(tmp_path / "pipe"), str(tmp_path))


def grant(daemon: Control, share: float, *, is_strict: bool = True) -> SmGrant:
    return SmGrant(share, 132, daemon, is_strict)


@pytest.mark.parametrize(
    ("share", "visible"), [(0.5, 66), (0.6, 80), (0.6, 78), (1.0, 132), (0.97, 130)]
)
def test_share_that_is_kept(
    fake: Path,
    daemon: Control,
    driver: FakeDriver,
    caplog: pytest.LogCaptureFixture,
    share: float,
    visible: int,
) -> None:
    connect(fake, 5, os.getpid())
    driver.num_sms = visible
    assert grant(daemon, share).verify() == f"{visible} of 132 SMs"
    assert caplog.text == ""


def test_share_that_is_not_kept_is_refused_or_named(
    fake: Path, daemon: Control, driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    connect(fake, os.getpid())
    problem = "132 SMs are visible, but share 0.6 is 79"
    with pytest.raises(StartupError, match=problem):
        grant(daemon, 0.6).verify()
    assert grant(daemon, 0.6, is_strict=False).verify() == "132 of 132 SMs"
    assert problem in caplog.text


def test_fewer_sms_than_granted_are_named(
    fake: Path, daemon: Control, driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    """For instance where the daemon has a lower default percentage."""
    connect(fake, os.getpid())
    driver.num_sms = 66
    grant(daemon, 1.0).verify()
    assert "only 66 SMs for a share of 1: 132" in caplog.text


def test_process_that_is_no_client_is_refused(
    fake: Path, daemon: Control, driver: FakeDriver
) -> None:
    connect(fake, os.getpid() + 1)
    driver.num_sms = 66
    with pytest.raises(StartupError, match="no client of the MPS daemon"):
        grant(daemon, 0.5).verify()


def test_daemon_that_is_gone_is_noticed(
    fake: Path, daemon: Control, driver: FakeDriver, tmp_path: Path
) -> None:
    (tmp_path / "pipe" / f"{CONTROL}.pid").unlink()
    with pytest.raises(StartupError, match="Cannot find MPS control daemon process"):
        grant(daemon, 0.5).verify()


def test_without_a_daemon_the_grant_says_so(driver: FakeDriver) -> None:
    assert "no MPS" in SmGrant(0.5, 132, None, is_strict=True).verify()


def test_a_client_is_taken_off_the_gpu_before_it_is_killed(fake: Path, daemon: Control) -> None:
    (fake / "servers").write_text("77\n78\n")
    (fake / "clients-77").write_text("5\n")
    (fake / "clients-78").write_text("6\n")
    told = terms() | {"mps_pipe_directory": daemon.pipe_directory}
    backend.evict("cuda", 6, told)
    backend.evict("cuda", 9, told)  # it never connected
    backend.evict("cuda", 6, terms("off"))
    assert [c for c in commands(fake) if c.startswith("terminate")] == ["terminate_client 78 6"]


def test_eviction_without_a_daemon_is_a_warning(
    fake: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend.evict("cuda", 6, terms())
    assert "client 6 was not taken off the GPU" in caplog.text
