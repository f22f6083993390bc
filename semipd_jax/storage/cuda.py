"""Device memory shared between processes. The owner allocates it and runs no kernel on it.

Two ways to share, tried in this order: by descriptor (`cuda_vmm`), by IPC handle (`cuda_ipc`).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import numpy as np

from semipd_jax import cuda_driver
from semipd_jax.cuda_driver import CudaError, call
from semipd_jax.errors import StartupError
from semipd_jax.storage import cuda_ipc, cuda_vmm
from semipd_jax.storage.budget import Budget
from semipd_jax.storage.cuda_staging import Staging
from semipd_jax.storage.manifest import Region, Sharing, SharingError

CONTEXT_BYTES: Final = 768 << 20
"""Reserved per worker for what a CUDA context and its loaded libraries take. An estimate."""

_ROUNDING_BYTES: Final = 16 << 20
"""More than all regions together grow by when they are rounded up."""

_log = logging.getLogger(__name__)


class SharedAllocation(Protocol):
    num_bytes: int
    address: int
    fd: int

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Way:
    """How one process allocates and another attaches."""

    allocate: Callable[[int, int], SharedAllocation]
    attach: Callable[[Region, int], int]


_WAYS: Final[Mapping[Sharing, _Way]] = {
    "vmm": _Way(cuda_vmm.VmmMemory, cuda_vmm.attach),
    "ipc": _Way(cuda_ipc.IpcMemory, cuda_ipc.attach),
}


class CudaReservation:
    """One region, zeroed. `fd` is what other processes attach it by."""

    def __init__(self, region: Region, sharing: Sharing) -> None:
        self._memory = _WAYS[sharing].allocate(region.num_bytes, region.device)
        with contextlib.ExitStack() as undo:
            undo.callback(self._memory.close)
            call("cuMemsetD8", self._memory.address, 0, self._memory.num_bytes)
            call("cuCtxSynchronize")
            undo.pop_all()
        self.region = msgspec.structs.replace(
            region, num_bytes=self._memory.num_bytes, sharing=sharing
        )
        self.fd = self._memory.fd
        self._staging: Staging | None = None

    def writing(self, path: str) -> AbstractContextManager[np.ndarray]:
        """An array in pinned host memory. Its copy begins when the context ends."""
        if self._staging is None:
            self._staging = Staging(max(entry.num_bytes for entry in self.region.arrays))
        entry = self.region.entry(path)
        return self._staging.writing(entry, self._memory.address + entry.offset)

    def finish(self) -> None:
        """Waits for every copy. Raises CudaError if one failed."""
        if self._staging is not None:
            staging, self._staging = self._staging, None
            staging.close()

    def close(self) -> None:
        try:
            self.finish()
        finally:
            self._memory.close()


class CudaMemory:
    """The memory owner's side of one device, by one way of sharing."""

    def __init__(self, device: int, sharing: Sharing) -> None:
        self._device = device
        self._sharing: Sharing = sharing
        self._undo = contextlib.ExitStack()

    def budget(self, utilization: float, num_workers: int, activation_bytes: int) -> Budget:
        """`utilization` of the device, less what is in use now and what the workers will need."""
        free, total = (int(value) for value in call("cuMemGetInfo"))
        in_use = total - free + _ROUNDING_BYTES
        workers = num_workers * (CONTEXT_BYTES + activation_bytes)
        return Budget(
            available_bytes=max(int(total * utilization) - in_use - workers, 0),
            detail=(
                f"gpu_memory_utilization {utilization:g} of {_gib(total)}, less {_gib(in_use)} in "
                f"use and {_gib(workers)} for {num_workers} workers, each {_gib(CONTEXT_BYTES)} "
                f"for context and programs and {_gib(activation_bytes)} for activations"
            ),
            pool_takes_rest=True,
            worker_fraction=activation_bytes / total,
        )

    def reserve(self, region: Region) -> CudaReservation:
        """Raises CudaError and keeps nothing if the device has no room."""
        reservation = CudaReservation(
            msgspec.structs.replace(region, device=self._device), self._sharing
        )
        self._undo.callback(reservation.close)
        return reservation

    def close(self) -> None:
        """Gives back what was reserved, last first."""
        self._undo.close()


@contextlib.contextmanager
def open_memory(device: int = 0, sharing: Sharing | None = None) -> Iterator[CudaMemory]:
    """The owner's side, until the context ends. Without `sharing`, the first way that works.

    Raises StartupError if there is no usable device, or no way to share its memory.
    """
    with contextlib.ExitStack() as undo:
        try:
            info = cuda_driver.describe(device)
            undo.callback(cuda_driver.leave_context, cuda_driver.enter_context(device))
        except CudaError as error:
            raise StartupError(f"GPU {device} cannot be used: {error}") from error
        sharing = sharing or choose_sharing(device)
        _log.info("shares memory of GPU %d, %s, by %s", device, info.name, sharing)
        memory = CudaMemory(device, sharing)
        undo.callback(memory.close)
        yield memory


def choose_sharing(device: int) -> Sharing:
    """The first way that works for a small allocation. Raises StartupError if none does."""
    refusals: list[str] = []
    for sharing, way in _WAYS.items():
        try:
            way.allocate(1, device).close()
        except CudaError as error:
            refusals.append(f"{sharing}: {error}")
            continue
        if refusals:
            _log.warning("GPU memory is shared by %s, because %s", sharing, refusals[0])
        return sharing
    raise StartupError(f"memory of GPU {device} cannot be shared: {'; '.join(refusals)}")


def map_region(region: Region, fd: int) -> int:
    """Maps the region into this process until it ends and returns its address.

    Raises SharingError if it was not shared by the driver, CudaError if the driver refuses.
    """
    if region.sharing not in _WAYS:
        raise SharingError(f"region {region.name!r} is shared by {region.sharing!r}, not by CUDA")
    cuda_driver.enter_context(region.device)  # for good: the mapping needs it
    return _WAYS[region.sharing].attach(region, fd)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
