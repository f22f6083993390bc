"""A share of a GPU's SMs, by NVIDIA MPS: the processes of one user run on one GPU at the same time,
each on at most a percentage of its SMs.

The percentage is a cap, not a reservation, and is read once, when a process starts to use CUDA.
Shares may add up to more than 1. That is why static SM partitions (CUDA 13.1, Ampere and later) are
not used: they are disjoint, and a client in one ignores its percentage.

Only workers are clients of MPS: a fatal fault of one client ends all of them, and the memory owner
must outlive that.
"""

import contextlib
import logging
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from semipd_jax import cuda_driver
from semipd_jax.config import MAX_WORKERS, Lane, ShareConfig
from semipd_jax.errors import StartupError
from semipd_jax.run_dir import hold

CONTROL: Final = "nvidia-cuda-mps-control"
PIPE_DIRECTORY: Final = "CUDA_MPS_PIPE_DIRECTORY"
LOG_DIRECTORY: Final = "CUDA_MPS_LOG_DIRECTORY"
PERCENTAGE: Final = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"

_DEFAULT_PIPE_DIRECTORY: Final = "/tmp/nvidia-mps"
_LONGEST_SOCKET: Final = "control_privileged"
_MAX_SOCKET_PATH: Final = 107
_TIMEOUT_S: Final = 20.0
_ROUNDING_SMS: Final = 2
"""SMs come in pairs, so a percentage may give this many more than it says."""

_OTHER_LIMITS: Final = (
    "CUDA_MPS_SM_PARTITION",
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
    "CUDA_MPS_ENABLE_PER_CTX_DEVICE_MULTIPROCESSOR_PARTITIONING",
)
_NOT_FOR_THE_DAEMON: Final = (
    *_OTHER_LIMITS,
    PERCENTAGE,
    "CUDA_MPS_PROTOCOL_VERSION",
    "CUDA_VISIBLE_DEVICES",  # the daemon would count devices from there, and clients again
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Control:
    """The control daemon behind one pipe directory."""

    pipe_directory: str
    log_directory: str

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_THE_DAEMON}
        return kept | {PIPE_DIRECTORY: self.pipe_directory, LOG_DIRECTORY: self.log_directory}

    def ask(self, command: str) -> str:
        """The daemon's answer. Raises StartupError if there is none."""
        return self._run([CONTROL], command + "\n")

    def start(self) -> None:
        """Raises StartupError, with the end of the daemon's log, if it does not run afterwards."""
        try:
            self._run([CONTROL, "-d"], "")
            self.ask("get_server_list")
        except StartupError as error:
            raise StartupError(f"{error}{self._log_end()}") from error

    def servers(self) -> list[int]:
        return _pids(self.ask("get_server_list"))

    def clients(self) -> dict[int, int]:
        """Process id of every client → that of its server."""
        return {
            client: server
            for server in self.servers()
            for client in _pids(self.ask(f"get_client_list {server}"))
        }

    def _run(self, argv: list[str], text: str) -> str:
        try:
            done = subprocess.run(
                argv,
                input=text,
                env=self.environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError as error:
            raise StartupError(f"{CONTROL} is not on PATH") from error
        except OSError as error:
            raise StartupError(f"{CONTROL} cannot be run: {error}") from error
        except subprocess.TimeoutExpired as error:
            raise StartupError(f"{CONTROL} did not answer within {_TIMEOUT_S:.0f} s") from error
        if done.returncode != 0:
            raise StartupError(f"{CONTROL}: {done.stdout.strip() or f'status {done.returncode}'}")
        return done.stdout

    def _log_end(self) -> str:
        try:
            lines = (Path(self.log_directory) / "control.log").read_text().splitlines()
        except OSError:
            return ""
        return "".join(f"; {line}" for line in lines[-3:])


@dataclass(frozen=True, slots=True)
class SmGrant:
    """What a worker may use: `share` of `num_sms`, if `control` keeps it to that.

    Attributes:
      control: None without MPS.
      is_strict: whether a worker that is not capped refuses to run, or only warns.
    """

    share: float
    num_sms: int
    control: Control | None
    is_strict: bool

    def verify(self) -> str:
        visible = cuda_driver.describe(0).num_sms
        if self.control is None:
            return f"{visible} SMs, by turns with other processes: no MPS"
        wanted = self.share * self.num_sms
        if os.getpid() not in self.control.clients():
            self._object("this process is no client of the MPS daemon")
        elif visible > math.ceil(wanted) + _ROUNDING_SMS:
            self._object(f"{visible} SMs are visible, but share {self.share:g} is {wanted:.0f}")
        elif visible < math.floor(wanted) - _ROUNDING_SMS:
            _log.warning("only %d SMs for a share of %g: %.0f", visible, self.share, wanted)
        return f"{visible} of {self.num_sms} SMs"

    def _object(self, problem: str) -> None:
        if self.is_strict:
            raise StartupError(f"the SM share is not kept: {problem}")
        _log.warning("the SM share is not kept: %s", problem)


@contextlib.contextmanager
def host(config: ShareConfig, run_dir: str, num_sms: int) -> Iterator[Mapping[str, str]]:
    """A daemon of our own, or the one that runs already, and the terms that lead workers to it.

    Raises StartupError if mps is "on" and no daemon can be had.
    """
    with contextlib.ExitStack() as stack:
        control = None
        if config.mps != "off":
            try:
                control = _running(config) or stack.enter_context(private_daemon(run_dir))
            except StartupError as error:
                if config.mps == "on":
                    raise StartupError(f"mps is 'on', but: {error}") from error
                _log.warning("SM shares are not kept, processes take turns: %s", error)
        elif min(*config.rungs("prefill"), *config.rungs("decode")) < 1.0:
            _log.warning("SM shares are not kept: mps is 'off'")
        yield {
            "mps": config.mps if control else "off",
            "mps_pipe_directory": control.pipe_directory if control else _nowhere(run_dir),
            "mps_log_directory": control.log_directory if control else _nowhere(run_dir),
            "num_sms": str(num_sms),
        }


def apply(share: float, lane: Lane, terms: Mapping[str, str]) -> SmGrant:
    """Makes this process, once it starts CUDA, a client with a percentage; or no client at all."""
    for name in (*_OTHER_LIMITS, PERCENTAGE):
        os.environ.pop(name, None)
    control = _control(terms)
    os.environ[PIPE_DIRECTORY] = terms["mps_pipe_directory"]
    os.environ[LOG_DIRECTORY] = terms["mps_log_directory"]
    if control is not None:
        os.environ[PERCENTAGE] = str(percentage(share))
    return SmGrant(share, int(terms["num_sms"]), control, is_strict=terms["mps"] == "on")


def abstain(run_dir: str) -> None:
    """Leads this process away from any daemon: there is none behind this directory."""
    os.environ.update(outside(run_dir))


def outside(run_dir: str) -> dict[str, str]:
    """The environment of a process that is no client."""
    return {PIPE_DIRECTORY: _nowhere(run_dir)}


def evict(pid: int, terms: Mapping[str, str]) -> None:
    """Ends a client's work on the GPU. Killing it with work in flight could harm the others."""
    if (control := _control(terms)) is None:
        return
    try:
        if (server := control.clients().get(pid)) is not None:
            control.ask(f"terminate_client {server} {pid}")
    except StartupError as error:
        _log.warning("client %d was not taken off the GPU: %s", pid, error)


def is_fate_shared(terms: Mapping[str, str]) -> bool:
    """A fatal fault ends all clients, and the server takes no new ones until the last has left."""
    return terms["mps"] != "off"


def percentage(share: float) -> int:
    """Whole percent, as MPS takes it."""
    return max(round(100 * share), 1)


@contextlib.contextmanager
def private_daemon(run_dir: str) -> Iterator[Control]:
    """A daemon that runs until the context ends, or this process does.

    Raises StartupError if it does not start.
    """
    if shutil.which(CONTROL) is None:
        raise StartupError(f"{CONTROL} is not on PATH")
    control = Control(f"{run_dir}/mps", f"{run_dir}/mps-log")
    longest = f"{control.pipe_directory}/{_LONGEST_SOCKET}"
    if len(longest) > _MAX_SOCKET_PATH:
        raise StartupError(f"socket path is longer than {_MAX_SOCKET_PATH}: {longest}; set TMPDIR")
    for directory in (control.pipe_directory, control.log_directory):
        os.mkdir(directory, 0o700)
    # The daemon detaches itself. What waits here for the end of its input outlives us by a moment,
    # however we end, and holds the directory for as long.
    held = hold(run_dir)
    try:
        keeper = subprocess.Popen(
            ["sh", "-c", f"cat > /dev/null; echo quit | {CONTROL}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=control.environment(),
            process_group=0,
            pass_fds=[held],
        )
    finally:
        os.close(held)
    with keeper:
        try:
            control.start()
            yield control
        finally:
            assert keeper.stdin is not None
            keeper.stdin.close()
            try:
                keeper.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _log.warning("the MPS daemon in %s does not quit", run_dir)
                keeper.kill()


def _running(config: ShareConfig) -> Control | None:
    """The daemon that CUDA would find now, unless it serves another user.

    Raises StartupError if it has no room for all workers.
    """
    named = os.environ.get(PIPE_DIRECTORY)
    pipe_directory = named or _DEFAULT_PIPE_DIRECTORY
    if not Path(pipe_directory).is_dir() or shutil.which(CONTROL) is None:
        return None
    control = Control(pipe_directory, os.environ.get(LOG_DIRECTORY, "/var/log/nvidia-mps"))
    try:
        servers = control.servers()
        if named is None:  # nobody vouches for it
            daemon = int((Path(pipe_directory) / f"{CONTROL}.pid").read_text())
            users = {_uid_of(pid) for pid in (daemon, *servers)}
            if not users <= {0, os.geteuid()}:
                return None
    except (StartupError, OSError, ValueError):
        return None
    num_clients = len(control.clients())
    if num_clients + config.max_num_workers > MAX_WORKERS:
        raise StartupError(
            f"the MPS daemon in {pipe_directory} has {num_clients} clients; with up to "
            f"{config.max_num_workers} workers of ours they are more than {MAX_WORKERS}"
        )
    _log.info("uses the MPS daemon in %s", pipe_directory)
    return control


def _uid_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def _control(terms: Mapping[str, str]) -> Control | None:
    if terms["mps"] == "off":
        return None
    return Control(terms["mps_pipe_directory"], terms["mps_log_directory"])


def _nowhere(run_dir: str) -> str:
    return f"{run_dir}/no-mps"


def _pids(answer: str) -> list[int]:
    return [int(line) for line in answer.split() if line.isdigit()]
