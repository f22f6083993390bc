"""What lies where in a shared region: the map that the memory owner hands out with the memory."""

import math
from collections.abc import Iterable
from typing import Final

import ml_dtypes
import msgspec
import numpy as np

ALIGNMENT: Final = 256
"""Bytes. XLA:CPU needs 64 and XLA:GPU 16; Mosaic kernels refuse less than 256."""


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
    """A piece of memory of one device that every process maps as a whole."""

    name: str
    num_bytes: int
    arrays: tuple[ArrayEntry, ...]
    device: int = 0


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype called `name`, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def lay_out(name: str, arrays: Iterable[tuple[str, tuple[int, ...], str]]) -> Region:
    """Places (path, shape, dtype) one after another, each aligned to ALIGNMENT bytes."""
    entries: list[ArrayEntry] = []
    end = 0
    for path, shape, dtype in arrays:
        entry = ArrayEntry(path, shape, dtype, offset=-(-end // ALIGNMENT) * ALIGNMENT)
        entries.append(entry)
        end = entry.offset + entry.num_bytes
    return Region(name, max(end, 1), tuple(entries))
