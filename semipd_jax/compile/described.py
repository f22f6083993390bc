"""For a GPU that is not here: what can be found out without one.

Every worker's programs are compiled in a process of their own, as a compiler may end its process:
`python -m semipd_jax.compile.child`.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from typing import IO, Any, Final, Literal, get_args

import msgspec

from semipd_jax.config import LANES, EngineConfig, Lane
from semipd_jax.errors import StartupError
from semipd_jax.messages import Line, Progress

type Gpu = Literal["h100", "h200", "a100"]

GPUS: Final[tuple[Gpu, ...]] = get_args(Gpu.__value__)
_TIMEOUT_S: Final = 3600.0
_WAKE_S: Final = 0.5

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
    """Every bucket of every lane at every rung, `jobs` workers' at once. An interrupt, or the first
    failure, ends them all.

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
    with ThreadPoolExecutor(jobs) as pool, _Children() as children:
        futures = [pool.submit(_in_child, job, children, show) for job in work]
        return [program for programs in _results(futures) for program in programs]


class _Children:
    """The compilers. None is at work after the `with` statement, or starts then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen[bytes]] = []
        self._is_over = False

    def start(self, job: IO[bytes], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """One whose standard input and error are these files."""
        with self._lock:
            if self._is_over:
                raise CancelledError
            child = subprocess.Popen(
                [sys.executable, "-m", "semipd_jax.compile.child"],
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
            )
            self._started.append(child)
            return child

    def __enter__(self) -> "_Children":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True
            for child in self._started:
                child.kill()


def _results[T](futures: Sequence[Future[T]]) -> list[T]:
    """Raises what the first one to fail did. Python cannot wake a thread for a signal that comes
    just before it begins to wait, so that it wakes by itself now and then."""
    while True:
        done, waiting = wait(futures, timeout=_WAKE_S, return_when=FIRST_EXCEPTION)
        results = [future.result() for future in futures if future in done]
        if not waiting:
            return results


def _in_child(
    job: Job, children: _Children, show: Callable[[str, Progress], object]
) -> list[Compiled]:
    # The job is in a file: writing to a pipe fails if the child ends at once.
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as encoded:
        encoded.write(msgspec.json.encode(job))
        encoded.seek(0)
        with children.start(encoded, log) as child:
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
