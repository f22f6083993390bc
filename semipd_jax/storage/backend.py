"""How bytes are shared on one platform. Everything else in the engine is the same on all."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np

from semipd_jax.config import Platform
from semipd_jax.errors import StartupError
from semipd_jax.storage import cpu, host_memory
from semipd_jax.storage.manifest import Region


@runtime_checkable
class Reservation(Protocol):
    """The owner's side of one region: memory filled with zeros."""

    @property
    def region(self) -> Region: ...

    @property
    def fd(self) -> int:
        """What other processes map it by."""
        ...

    def writing(self, path: str) -> AbstractContextManager[np.ndarray]:
        """An array to fill in; its content is in the region when the context ends."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One platform.

    Attributes:
      available_bytes: memory that this process could still reserve.
      reserve: allocates a region; the memory lives while any process maps it or holds its `fd`.
      map_region: maps all of a region until the process ends and returns its address, aligned to
        `manifest.ALIGNMENT`. Raises SharingError if the memory is not what the manifest says.
    """

    available_bytes: Callable[[], int]
    reserve: Callable[[Region], Reservation]
    map_region: Callable[[Region, int], int]


_BACKENDS: Final[Mapping[Platform, Backend]] = {
    "cpu": Backend(host_memory.available_bytes, cpu.HostMemory, cpu.map_region)
}


def backend(platform: Platform) -> Backend:
    """Raises StartupError for a platform that memory cannot be shared on yet."""
    if platform not in _BACKENDS:
        raise StartupError(f"platform is {platform!r}; allowed: {', '.join(_BACKENDS)}")
    return _BACKENDS[platform]
