"""How bytes are shared on one platform. Everything else in the engine is the same on all."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np

from semipd_jax.config import Platform
from semipd_jax.storage import cpu, cuda
from semipd_jax.storage.budget import Budget
from semipd_jax.storage.manifest import Region


@runtime_checkable
class Reservation(Protocol):
    """The owner's side of one region: memory filled with zeros.

    Attributes:
      region: as it came to be; it may be larger than what was asked for.
      fd: what other processes map it by.
    """

    @property
    def region(self) -> Region: ...

    @property
    def fd(self) -> int: ...

    def writing(self, path: str) -> AbstractContextManager[np.ndarray]:
        """An array to fill in. Its content goes to the region when the context ends."""
        ...

    def finish(self) -> None:
        """Returns when everything written is in the region."""
        ...

    def close(self) -> None:
        """Gives the memory back, as far as this process goes."""
        ...


@runtime_checkable
class Memory(Protocol):
    """The owner's side of one device's memory."""

    def budget(self, utilization: float, num_workers: int, activation_bytes: int) -> Budget:
        """What the engine may take now.

        Args:
          utilization: fraction of a GPU's memory that may be in use.
          activation_bytes: what each worker allocates for itself, at most.
        """
        ...

    def reserve(self, region: Region) -> Reservation: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One platform.

    Attributes:
      open_memory: the owner's side, usable until the context ends.
      map_region: maps all of a region until the process ends and returns its address, aligned to
        `manifest.ALIGNMENT`. Raises SharingError if the memory is not what the manifest says.
      dtype: of models whose dtype was left open; None means the checkpoint's.
      page_size: tokens of a KV page, if it was left open.
      environment: what must be in a worker's environment before it imports jax; None: must not.
    """

    open_memory: Callable[[], AbstractContextManager[Memory]]
    map_region: Callable[[Region, int], int]
    dtype: str | None
    page_size: int
    environment: Mapping[str, str | None]


_BACKENDS: Final[Mapping[Platform, Backend]] = {
    "cpu": Backend(
        cpu.open_memory,
        cpu.map_region,
        dtype="float32",  # XLA:CPU emulates the shorter types
        page_size=16,
        environment={"JAX_PLATFORMS": "cpu"},
    ),
    "cuda": Backend(
        cuda.open_memory,
        cuda.map_region,
        dtype=None,
        page_size=64,  # 16 KiB of one head at head_dim 128 in 16 bits: one TMA copy
        environment={
            "JAX_PLATFORMS": "cuda",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # workers of an idle share cost little
            "XLA_PYTHON_CLIENT_ALLOCATOR": None,
            "XLA_PYTHON_CLIENT_MEM_FRACTION": None,  # the old name: both together are an error
        },
    ),
}


def backend(platform: Platform) -> Backend:
    return _BACKENDS[platform]


def worker_environment(platform: Platform, fraction: float | None) -> dict[str, str | None]:
    """What to set (None: remove) before jax is imported.

    Without JAX_PLATFORMS an installed GPU plugin complains where there is no GPU.

    Args:
      fraction: of the device's memory that jax may allocate for itself; None is no limit.
    """
    limit = {} if fraction is None else {"XLA_CLIENT_MEM_FRACTION": f"{fraction:.4f}"}
    return {**_BACKENDS[platform].environment, **limit}
