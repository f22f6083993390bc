"""Mapped regions as jax arrays that steps update in place, and the guards that keep it so.

A region has one array per entry and process: XLA orders reads and writes by array, not by address.
Nothing here copies. What copies anyway raises `SharingError`: a copy would be a wrong answer.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np

from semipd_jax.config import Platform
from semipd_jax.storage.lifetime import keep_until_exit
from semipd_jax.storage.manifest import ALIGNMENT, SharingError, numpy_dtype
from semipd_jax.storage.mapping import MappedRegion


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """DLTensor of DLPack 0.8. Without strides it is row major."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_DEVICE_TYPES: Final[Mapping[Platform, int]] = {"cpu": 1}
_TYPE_CODES: Final = {"int32": 0, "float16": 2, "float32": 2, "bfloat16": 4}

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

# XLA calls the deleter from its own threads, where a Python callback would wait for the GIL. Any C
# function that ignores its argument will do.
_NO_OP: Final = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value


class _Exporter:
    """Memory at `address` as a producer of the DLPack protocol. It must outlive every array."""

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: str, device_type: int, device: int
    ) -> None:
        self._dims = (ctypes.c_int64 * len(shape))(*shape)
        self._managed = _ManagedTensor(deleter=_NO_OP)
        tensor = self._managed.tensor
        tensor.data = address
        tensor.device = _Device(device_type, device)
        tensor.ndim = len(shape)
        tensor.dtype = _DataType(_TYPE_CODES[dtype], numpy_dtype(dtype).itemsize * 8, 1)
        tensor.shape = ctypes.cast(self._dims, ctypes.POINTER(ctypes.c_int64))
        keep_until_exit(self)

    def __dlpack_device__(self) -> tuple[int, int]:
        device = self._managed.tensor.device
        return device.type, device.id

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)


def view(
    address: int, shape: tuple[int, ...], dtype: str, *, platform: Platform, device: int = 0
) -> jax.Array:
    """An array over memory that stays mapped until the process ends. jax never frees it."""
    if address % ALIGNMENT:
        raise SharingError(f"address {address:#x} is not a multiple of {ALIGNMENT}")
    exporter = _Exporter(address, shape, dtype, _DEVICE_TYPES[platform], device)
    # On the CPU, only what was imported with copy=True is donated in place, and aligned memory is
    # not copied (jax 0.11, 0.12). Any other import is silently detached by its first donation.
    array = jax.dlpack.from_dlpack(exporter, copy=platform == "cpu")
    check_result(array, address)
    return array


def region_arrays(mapped: MappedRegion) -> dict[str, jax.Array]:
    """Every array of a region by path. Call it once per region and process."""
    return {
        entry.path: view(
            mapped.base + entry.offset,
            entry.shape,
            entry.dtype,
            platform=mapped.platform,
            device=mapped.region.device,
        )
        for entry in mapped.region.arrays
    }


def check_result(array: jax.Array, address: int) -> None:
    """Raises SharingError unless `array` lives at `address`. Cheap enough for every step."""
    if array.unsafe_buffer_pointer() != address:
        raise SharingError(
            f"array of shape {array.shape} is at {array.unsafe_buffer_pointer():#x}, "
            f"no longer in the shared region at {address:#x}"
        )


def check_program(
    compiled: Any, shared: Sequence[jax.Array | jax.ShapeDtypeStruct], max_temp_bytes: int
) -> None:
    """Raises SharingError unless a `jax.stages.Compiled` updates all `shared` arrays in place.

    `shared` are its donated arguments. A program may alias an array and still copy it out and back,
    which undoes what another process wrote meanwhile. So no copy of a shared shape is allowed, and
    `max_temp_bytes` should be below the size of the smallest of them.
    """
    stats = compiled.memory_analysis()
    wanted = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in shared)
    if stats.alias_size_in_bytes < wanted:
        raise SharingError(
            f"only {stats.alias_size_in_bytes} of {wanted} shared bytes are updated in place"
        )
    if stats.temp_size_in_bytes > max_temp_bytes:
        raise SharingError(
            f"the program needs {stats.temp_size_in_bytes} temporary bytes; "
            f"allowed: {max_temp_bytes}"
        )
    shapes = [f"[{','.join(map(str, array.shape))}]" for array in shared]
    for line in compiled.as_text().splitlines():
        if (" copy(" in line or " copy-start(" in line) and any(s in line for s in shapes):
            raise SharingError(f"the program copies a shared array: {line.strip()[:120]}")
