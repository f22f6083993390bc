"""Where an engine runs: on a GPU, if there is one that can be used, or on the CPU.

The driver is asked by another process (`python -m semipd_jax.launch.device`), so that this one
never holds a CUDA context.
"""

import ctypes
import importlib.util
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from semipd_jax.config import Device, Platform
from semipd_jax.cuda_driver import DeviceInfo, describe_all
from semipd_jax.errors import EngineError, StartupError
from semipd_jax.shares import mps

_TIMEOUT_S: Final = 60.0
_PLUGINS: Final = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chosen:
    """`num_sms` is that of the whole GPU; 0 on a CPU. `name` is the model's."""

    platform: Platform
    num_sms: int = 0
    name: str = ""


def choose(device: Device, run_dir: str) -> Chosen:
    """Raises StartupError if a GPU is asked for and none can be used.

    With "auto", a GPU that is there but cannot be used is worth a warning.
    """
    if device == "cpu" or (device == "auto" and not _has_driver()):
        return Chosen("cpu")
    try:
        gpu = usable_gpu(run_dir)
        return Chosen("cuda", gpu.num_sms, gpu.name)
    except StartupError as error:
        if device == "cuda":
            raise StartupError(f"device is 'cuda', but {error}") from error
        _log.warning("runs on the CPU: %s", error)
        return Chosen("cpu")


def cpu_name() -> str:
    """Its model and the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, 'CPU')}, {len(os.sched_getaffinity(0))} cores"


def usable_gpu(run_dir: str) -> DeviceInfo:
    """The first GPU. Raises StartupError that says what is missing."""
    if not _has_driver():
        raise StartupError("no NVIDIA driver is here")
    gpus = _ask_driver(run_dir)
    if not gpus:
        raise StartupError("the NVIDIA driver shows no GPU")
    if not any(importlib.util.find_spec(plugin) for plugin in _PLUGINS):
        raise StartupError("jax has no CUDA plugin: install semipd-jax[cuda13]")
    return gpus[0]


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _ask_driver(run_dir: str) -> list[DeviceInfo]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "semipd_jax.launch.device"],
            env=os.environ | mps.outside(run_dir),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StartupError(f"the NVIDIA driver did not answer in {_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise StartupError(done.stderr.decode(errors="replace").strip())
    return msgspec.json.decode(done.stdout, type=list[DeviceInfo])


def _main() -> int:
    try:
        gpus = describe_all()
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    print(msgspec.json.encode(gpus).decode())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
