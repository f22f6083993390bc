"""What lies where in a shared region: the map that the memory owner hands out with the memory."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final, Literal

import ml_dtypes
import msgspec
import numpy as np

from semipd_jax.errors import EngineError

type Sharing = Literal["memfd", "vmm", "ipc"]
"""What a region's descriptor is: a memory file, device memory, or a file with an IPC handle."""

WEIGHTS: Final = "weights"
"""The region of the model's parameters, by `WeightSpec.path`. Workers only read it."""

STATE: Final = "state"
"""The region that steps update: "layers/{i}/{KV array name}" [num_pages, *page_shape] and
"tokens" int32 [num_rows, max_model_len + 1]."""

ALIGNMENT: Final = 256
"""Bytes. XLA:CPU needs 64 and XLA:GPU 16; Mosaic kernels refuse less than 256."""

_DTYPES: Final[Mapping[str, np.dtype]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "int32": np.dtype(np.int32),
}


class SharingError(EngineError):
    """Memory is not what its manifest says, or a program does not update it in place."""


class ArrayEntry(msgspec.Struct, frozen=True):
    """One array of a region, row major, `offset` bytes after the region's start."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


class Region(msgspec.Struct, frozen=True):
    """A piece of memory of one device that every process maps as a whole.

    Attributes:
      arrays: in ascending order of offset.
      writable: whether workers may write to it.
      device: whose memory it is, by ordinal.
      sharing: how other processes map it.
    """

    name: str
    num_bytes: int
    arrays: tuple[ArrayEntry, ...]
    writable: bool = False
    device: int = 0
    sharing: Sharing = "memfd"

    def entry(self, path: str) -> ArrayEntry:
        for entry in self.arrays:
            if entry.path == path:
                return entry
        raise SharingError(f"region {self.name!r} has no array {path!r}")


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype called `name`; raises ValueError if shared memory holds no such arrays."""
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def lay_out(
    name: str, arrays: Iterable[tuple[str, tuple[int, ...], str]], *, writable: bool = False
) -> Region:
    """Places (path, shape, dtype) one after another, each aligned to ALIGNMENT bytes."""
    entries: list[ArrayEntry] = []
    end = 0
    for path, shape, dtype in arrays:
        entry = ArrayEntry(path, shape, dtype, offset=-(-end // ALIGNMENT) * ALIGNMENT)
        entries.append(entry)
        end = entry.offset + entry.num_bytes
    return Region(name, max(end, 1), tuple(entries), writable)


def check(region: Region) -> None:
    """Raises SharingError unless every array is aligned, inside the region and clear of others."""
    for entry in region.arrays:
        if entry.dtype not in _DTYPES:
            raise SharingError(f"region {region.name!r}: unknown dtype in {entry}")
        if min(entry.shape, default=0) < 0 or entry.offset < 0 or entry.offset % ALIGNMENT:
            raise SharingError(f"region {region.name!r}: misplaced array {entry}")
        if entry.offset + entry.num_bytes > region.num_bytes:
            raise SharingError(f"region {region.name!r} of {region.num_bytes} B: too small {entry}")
    for before, after in pairwise(region.arrays):
        if before.offset + before.num_bytes > after.offset:
            raise SharingError(f"region {region.name!r}: {before} overlaps {after}")
    if len({entry.path for entry in region.arrays}) < len(region.arrays):
        raise SharingError(f"region {region.name!r} names an array twice")
