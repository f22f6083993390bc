"""Mapped regions as jax arrays that donation updates in place.

A region has one array per entry and process: XLA orders reads and writes by array, not by address.
An array that left its region raises `SharingError`: a silent copy would be a wrong answer.
"""

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import jax

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


_DEVICE_TYPES: Final[Mapping[Platform, int]] = {"cpu": 1, "cuda": 2}
_TYPE_CODES: Final = {"int32": 0, "float16": 2, "float32": 2, "bfloat16": 4}

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

# XLA calls the deleter from its own threads, where a Python callback would wait for the GIL, and on
# a GPU without looking whether there is one. Any C function that ignores its argument will do.
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
    # not copied (jax 0.11, 0.12). Any other import is silently detached by its first donation. On a
    # GPU every import is donated in place, and copy=True would read the address as the host's.
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
