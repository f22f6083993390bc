"""Where an engine runs, on machines with and without a driver (`fake_cuda_driver`)."""

import textwrap
from pathlib import Path

import pytest

from semipd_jax.errors import StartupError
from semipd_jax.launch import device
from semipd_jax.launch.device import Chosen, choose


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one GPU and a plugin. What is appended to the file changes the `driver`."""
    fake = """
        from fake_cuda_driver import FakeDriver
        driver = FakeDriver()
        driver.install()
    """
    path = tmp_path / "sitecustomize.py"
    path.write_text(textwrap.dedent(fake))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setattr(device, "_has_driver", lambda: True)
    monkeypatch.setattr(device, "_PLUGINS", ("jaxlib",))
    return path


def change(gpu: Path, line: str) -> None:
    gpu.write_text(f"{gpu.read_text()}\n{line}\n")


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path)


def test_gpu_is_used_where_there_is_one(gpu: Path, run_dir: str) -> None:
    assert choose("auto", run_dir) == choose("cuda", run_dir) == Chosen("cuda", 132, "Fake GPU")


def test_cpu_asks_no_driver(gpu: Path, run_dir: str) -> None:
    change(gpu, "raise SystemExit(1)")
    assert choose("cpu", run_dir) == Chosen("cpu")


def test_driver_is_asked_outside_mps(
    gpu: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A percentage that this process was started under would hide SMs."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", run_dir)
    change(gpu, "import os")
    change(
        gpu, "driver.num_sms = 7 if os.path.exists(os.environ['CUDA_MPS_PIPE_DIRECTORY']) else 9"
    )
    assert choose("cuda", run_dir).num_sms == 9


def test_machine_without_a_driver(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device.ctypes, "CDLL", _missing)
    assert choose("auto", run_dir) == Chosen("cpu")
    assert caplog.text == ""
    with pytest.raises(StartupError, match="device is 'cuda', but no NVIDIA driver is here"):
        choose("cuda", run_dir)


def _missing(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("driver.num_devices = 0", "cuInit failed with CUDA_ERROR_NO_DEVICE"),
        ("import sys; sys.modules['cuda.bindings.driver'] = None", "needs cuda-bindings"),
    ],
)
def test_gpu_that_cannot_be_used(
    gpu: Path, run_dir: str, line: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    change(gpu, line)
    assert choose("auto", run_dir) == Chosen("cpu")
    assert "runs on the CPU" in caplog.text
    assert reason in caplog.text
    with pytest.raises(StartupError, match=reason):
        choose("cuda", run_dir)


def test_gpu_without_a_plugin_of_jax(
    gpu: Path,
    run_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(device, "_PLUGINS", ("no_such_module",))
    assert choose("auto", run_dir) == Chosen("cpu")
    assert "jax has no CUDA plugin: install semipd-jax[cuda13]" in caplog.text
