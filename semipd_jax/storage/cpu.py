"""Host memory shared between processes: an anonymous file that each of them maps."""

import fcntl
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np

from semipd_jax.storage import host_memory
from semipd_jax.storage.budget import Budget
from semipd_jax.storage.lifetime import keep_until_exit
from semipd_jax.storage.manifest import Region, SharingError, numpy_dtype

RUNTIME_BYTES: Final = 400 << 20
"""Of each worker: interpreter, jax and compiled programs. Workers of the demo model that found
their programs in the cache held 336 to 400 MiB, those that compiled them 712 to 797 (the start-up
log says); but no engine has all the workers that it may have."""

_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class HostMemory:
    """One region, by memfd_create(2). The kernel provides zeroed pages when they are first touched.

    The size is sealed: no process can shrink the file and so make another one fault.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.fd = os.memfd_create(f"semipd-{region.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, region.num_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _FIXED_SIZE | fcntl.F_SEAL_SEAL)

    @contextmanager
    def writing(self, path: str) -> Iterator[np.ndarray]:
        """The array itself. It is unmapped here when the caller drops it."""
        entry = self.region.entry(path)
        start = entry.offset % mmap.ALLOCATIONGRANULARITY
        window = mmap.mmap(
            self.fd,
            start + entry.num_bytes,
            flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,  # a fault per page is slower
            offset=entry.offset - start,
        )
        flat = np.frombuffer(window, numpy_dtype(entry.dtype), math.prod(entry.shape), start)
        yield flat.reshape(entry.shape)

    def finish(self) -> None:
        """Nothing is under way: arrays are written in place."""

    def close(self) -> None:
        """Gives up the owner's hold; the memory lives on where it is mapped."""
        os.close(self.fd)


class HostMemories:
    """The memory owner's side of the machine's memory."""

    def budget(self, utilization: float, num_workers: int, activation_bytes: int) -> Budget:
        """What is available now, less what the workers will need."""
        available = host_memory.available_bytes()
        workers = num_workers * (RUNTIME_BYTES + activation_bytes)
        return Budget(
            available_bytes=max(available - workers, 0),
            detail=(
                f"{available / 2**30:.2f} GiB, less {workers / 2**30:.2f} GiB for {num_workers} "
                f"workers, each {RUNTIME_BYTES >> 20} MiB for runtime and programs and "
                f"{activation_bytes >> 20} MiB for activations"
            ),
        )

    def reserve(self, region: Region) -> HostMemory:
        return HostMemory(region)


@contextmanager
def open_memory() -> Iterator[HostMemories]:
    yield HostMemories()


def map_region(region: Region, fd: int) -> int:
    """Maps the region until the process ends: read-only, unless workers may write to it.

    Returns the address. Raises SharingError if `fd` is not memory of this fixed size.
    """
    size = os.fstat(fd).st_size
    if size != region.num_bytes:
        raise SharingError(f"region {region.name!r}: {size} B, manifest says {region.num_bytes} B")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise SharingError(f"region {region.name!r} is not a memory file") from error
    if seals & _FIXED_SIZE != _FIXED_SIZE:
        raise SharingError(f"region {region.name!r} can change its size")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if region.writable else 0)
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
    keep_until_exit(memory)
    return np.frombuffer(memory, np.uint8).ctypes.data
