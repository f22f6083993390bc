"""For a GPU that is not here: what can be found out without one.

Every worker's programs are compiled in a process of their own, as a compiler may end its process:
`python -m semipd_jax.compile.child`.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal, get_args

import msgspec

from semipd_jax.config import LANES, EngineConfig, Lane
from semipd_jax.errors import StartupError
from semipd_jax.messages import Line, Progress

type Gpu = Literal["h100", "h200", "a100"]

GPUS: Final[tuple[Gpu, ...]] = get_args(Gpu.__value__)
_TIMEOUT_S: Final = 3600.0

LIMITS: Final = """\
What this could not do, and a start on the GPU still has to:
  - Fill the cache of a machine with this GPU. JAX names an entry by the version of the client and
    the plugin's fingerprint of the device, which only a running GPU tells; and an executable that
    was made without a client can be stored, but is loaded by a client with a GPU only.
  - Choose the fastest kernels of matrix products: that takes timing them on the device. What is
    compiled here has default ones, so it should not be loaded even if it could.
  - Know how many pages the KV pool will have: that follows from what is free on the device.
On the machine with the GPU, the same command without --gpu fills the cache."""


class Job(msgspec.Struct, frozen=True):
    """One worker's programs."""

    config: EngineConfig
    gpu: Gpu
    lane: Lane
    share: float

    @property
    def name(self) -> str:
        return f"{self.lane} {self.share:.2f}"


class Compiled(Line, frozen=True):
    """One program.

    Attributes:
      temp_bytes: of temporaries. The pool is updated in place, or there is a problem.
      problem: why there is no program; else None.
    """

    lane: Lane
    share: float
    num_sms: int
    num_tokens: int
    num_rows: int
    seconds: float
    temp_bytes: int = 0
    problem: str | None = None

    def __str__(self) -> str:
        what = f"{self.lane} at {self.share:g} ({self.num_sms} SMs)"
        size = f"{self.num_tokens} tokens in {self.num_rows} rows"
        found = self.problem or f"{self.temp_bytes / 2**20:.1f} MiB of temporaries"
        return f"{what}, {size}: {self.seconds:.1f} s, {found}"


_decoder = msgspec.json.Decoder[Any](Progress | Compiled)


def compile_all(
    config: EngineConfig, gpu: Gpu, *, jobs: int, show: Callable[[str, Progress], object]
) -> list[Compiled]:
    """Every bucket of every lane at every rung, `jobs` workers' at once.

    Args:
      show: called with (worker, progress) while it goes on, from several threads.

    Raises:
      StartupError: a compiler ended the process, or the packages of the extra `aot` are missing.
    """
    work = [
        Job(config, gpu, lane, share)
        for lane in LANES[config.mode]
        for share in config.shares.rungs(lane)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda job: _in_child(job, show), work)
        return [program for programs in results for program in programs]


def _in_child(job: Job, show: Callable[[str, Progress], object]) -> list[Compiled]:
    # The job is in a file: writing to a pipe fails if the child ends at once.
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as encoded:
        encoded.write(msgspec.json.encode(job))
        encoded.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "semipd_jax.compile.child"],
            stdin=encoded,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        ) as child:
            limit = threading.Timer(_TIMEOUT_S, child.kill)
            limit.start()
            try:
                programs = _listen(child, job.name, show)
                status = child.wait()
            finally:
                limit.cancel()
                child.kill()
        if status != 0:
            log.seek(0)
            words = log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise StartupError(f"{job.name}: status {status}: {''.join(words)}")
    return programs


def _listen(
    child: subprocess.Popen[bytes], name: str, show: Callable[[str, Progress], object]
) -> list[Compiled]:
    """What a child says until it ends."""
    programs: list[Compiled] = []
    total = 0
    assert child.stdout is not None
    for line in child.stdout:
        message = _decoder.decode(line)
        if isinstance(message, Progress):
            total = message.total
        else:
            programs.append(message)
        show(name, Progress(stage="compile", done=len(programs), total=total))
    return programs
