"""`cuda.bindings.driver` without a GPU: real structs and enums, functions that keep the rules.

Device memory is a memory file, so that it can be passed between processes; device addresses are
addresses of this process, and access rights are the kernel's. Copies happen when their stream is
waited for, no sooner. `live` counts what was acquired and not given back.
"""

# ruff: noqa: N802 - the driver's names

import ctypes
import functools
import itertools
import os
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver as real

from semipd_jax import cuda_driver

GRANULARITY = 2 << 20
MODULE = "cuda.bindings.driver"
Result = real.CUresult
_NONE, _READ, _WRITE = 0, 1, 2
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_IPC = struct.Struct("<8sQQQ")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _mmap(address: int, size: int, protection: int, flags: int, fd: int = -1) -> int:
    found = _libc.mmap(address, size, protection, flags, fd, 0)
    assert found not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return found


class RefusalError(Exception):
    def __init__(self, result: str) -> None:
        self.result = getattr(Result, result)


def _require(ok: bool, result: str = "CUDA_ERROR_INVALID_VALUE") -> None:
    if not ok:
        raise RefusalError(result)


def _driver_function(function: Any) -> Any:
    """Counts the call, fails it if that is asked for, and adds the status."""

    @functools.wraps(function)
    def run(self: "FakeDriver", *args: Any) -> tuple[Any, ...]:
        name = function.__name__
        self.calls.append(name)
        if len(self.calls) - 1 == self.fail_at:
            return (getattr(Result, self.fail_with), *[None] * self.num_results)
        if name in self.refuses:
            return (getattr(Result, self.refuses[name]),)
        try:
            result = function(self, *args)
        except RefusalError as refusal:
            return (refusal.result, None)
        if result is None:
            return (Result.CUDA_SUCCESS,)
        return (Result.CUDA_SUCCESS, *(result if isinstance(result, tuple) else (result,)))

    return run


@dataclass
class Allocation:
    """One piece of device memory. It is there while it has a handle or a mapping."""

    fd: int
    size: int
    users: int = 1


@dataclass
class FakeDriver:
    """One GPU.

    Attributes:
      refuses: function name → the result that each of its calls fails with.
      fail_at: index of the one call that fails, with `fail_with`.
    """

    total_bytes: int = 1 << 30
    used_bytes: int = 0
    num_sms: int = 132
    num_devices: int = 1
    refuses: dict[str, str] = field(default_factory=dict)
    fail_at: int = -1
    fail_with: str = "CUDA_ERROR_UNKNOWN"
    num_results: int = 0
    calls: list[str] = field(default_factory=list)
    live: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ids = itertools.count(1000)
        self._handles: dict[int, Allocation] = {}
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, tuple[Allocation, int]] = {}
        self._blocks: dict[int, Allocation] = {}
        self._opened: dict[int, int] = {}
        self._host: dict[int, Any] = {}
        self._streams: dict[int, list[tuple[int, int, int]]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return getattr(real, name)
        raise AttributeError(name)

    def install(self, monkeypatch: Any = None) -> None:
        if monkeypatch is None:
            sys.modules[MODULE] = self  # type: ignore[assignment]
        else:
            monkeypatch.setitem(sys.modules, MODULE, self)
            monkeypatch.setattr(
                cuda_driver, "bindings", functools.cache(cuda_driver.bindings.__wrapped__)
            )
        cuda_driver.bindings.cache_clear()

    def _hold(self, what: str, change: int = 1) -> None:
        self.live[what] += change
        if self.live[what] == 0:
            del self.live[what]

    # ------------------------------------------------------------ devices and contexts

    @_driver_function
    def cuInit(self, flags):
        _require(self.num_devices > 0, "CUDA_ERROR_NO_DEVICE")

    @_driver_function
    def cuDeviceGetCount(self):
        return self.num_devices

    @_driver_function
    def cuDeviceGet(self, ordinal):
        _require(0 <= ordinal < self.num_devices, "CUDA_ERROR_INVALID_DEVICE")
        return real.CUdevice(ordinal)

    @_driver_function
    def cuDeviceGetName(self, length, device):
        return b"Fake GPU".ljust(length, b"\0")

    @_driver_function
    def cuDeviceGetAttribute(self, attribute, device):
        wanted = real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        _require(attribute == wanted)
        return self.num_sms

    @_driver_function
    def cuDeviceTotalMem(self, device):
        return self.total_bytes

    @_driver_function
    def cuDriverGetVersion(self):
        return 13010

    @_driver_function
    def cuDevicePrimaryCtxRetain(self, device):
        self._hold("context")
        return real.CUcontext(7)

    @_driver_function
    def cuDevicePrimaryCtxRelease(self, device):
        _require(self.live["context"] > 0, "CUDA_ERROR_INVALID_CONTEXT")
        self._hold("context", -1)

    @_driver_function
    def cuCtxSetCurrent(self, context):
        self._needs_context()

    @_driver_function
    def cuCtxSynchronize(self):
        self._needs_context()

    def _needs_context(self) -> None:
        _require(self.live["context"] > 0, "CUDA_ERROR_INVALID_CONTEXT")

    # ------------------------------------------------------------ virtual memory

    @_driver_function
    def cuMemGetInfo(self):
        self._needs_context()
        return self.total_bytes - self.used_bytes, self.total_bytes

    @_driver_function
    def cuMemGetAllocationGranularity(self, properties, option):
        return GRANULARITY

    @_driver_function
    def cuMemAddressReserve(self, size, alignment, address, flags):
        _require(size > 0 and size % GRANULARITY == 0)
        start = _mmap(0, size, _NONE, _PRIVATE | _ANONYMOUS | _NORESERVE)
        self._reserved[start] = size
        self._hold("addresses")
        return real.CUdeviceptr(start)

    @_driver_function
    def cuMemAddressFree(self, address, size):
        _require(self._reserved.get(address) == size and address not in self._mapped)
        del self._reserved[address]
        _libc.munmap(address, size)
        self._hold("addresses", -1)

    @_driver_function
    def cuMemCreate(self, size, properties, flags):
        fd_type = real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        _require(properties.requestedHandleTypes == fd_type)
        _require(size % GRANULARITY == 0)
        return self._new_handle(self._allocate(size))

    @_driver_function
    def cuMemRelease(self, handle):
        allocation = self._handles.pop(int(handle), None)
        _require(allocation is not None)
        self._hold("handle", -1)
        self._drop(allocation)

    @_driver_function
    def cuMemExportToShareableHandle(self, handle, kind, flags):
        _require(int(handle) in self._handles)
        return os.dup(self._handles[int(handle)].fd)

    @_driver_function
    def cuMemImportFromShareableHandle(self, fd, kind):
        self._needs_context()
        try:
            size = os.fstat(fd).st_size
            again = os.dup(fd)
        except OSError:
            raise RefusalError("CUDA_ERROR_INVALID_VALUE") from None
        return self._new_handle(Allocation(again, size))

    @_driver_function
    def cuMemMap(self, address, size, offset, handle, flags):
        _require(self._reserved.get(address) == size and address not in self._mapped)
        _require(int(handle) in self._handles)
        allocation = self._handles[int(handle)]
        _require(offset + size <= allocation.size)
        _mmap(address, size, _NONE, _SHARED | _FIXED, allocation.fd)
        allocation.users += 1
        self._mapped[address] = allocation, size
        self._hold("mapping")

    @_driver_function
    def cuMemUnmap(self, address, size):
        _require(address in self._mapped)
        allocation, mapped = self._mapped[address]
        _require(size == mapped)
        del self._mapped[address]
        _mmap(address, size, _NONE, _PRIVATE | _ANONYMOUS | _NORESERVE | _FIXED)
        self._hold("mapping", -1)
        self._drop(allocation)

    @_driver_function
    def cuMemSetAccess(self, address, size, access, count):
        _require(address in self._mapped and count == len(access) == 1)
        flags = real.CUmemAccess_flags
        assert access[0].location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        assert access[0].location.id == 0
        readable = flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        if access[0].flags == readable and "read-only" in self.refuses:
            raise RefusalError(self.refuses["read-only"])
        rights = _READ if access[0].flags == readable else _READ | _WRITE
        assert _libc.mprotect(address, size, rights) == 0

    def _allocate(self, size: int) -> Allocation:
        self._needs_context()
        _require(self.used_bytes + size <= self.total_bytes, "CUDA_ERROR_OUT_OF_MEMORY")
        fd = os.memfd_create("fake-device-memory")
        os.ftruncate(fd, size)
        os.pwrite(fd, b"\xff" * min(size, 4096), 0)  # new device memory holds anything
        self.used_bytes += size
        return Allocation(fd, size)

    def _new_handle(self, allocation: Allocation) -> Any:
        handle = next(self._ids)
        self._handles[handle] = allocation
        self._hold("handle")
        return real.CUmemGenericAllocationHandle(handle)

    def _drop(self, allocation: Allocation) -> None:
        allocation.users -= 1
        if allocation.users == 0:
            os.close(allocation.fd)
            self.used_bytes -= allocation.size

    # ------------------------------------------------------------ plain memory and IPC

    @_driver_function
    def cuMemAlloc(self, size):
        allocation = self._allocate(size)
        address = _mmap(0, size, _READ | _WRITE, _SHARED, allocation.fd)
        self._blocks[address] = allocation
        self._hold("block")
        return real.CUdeviceptr(address)

    @_driver_function
    def cuMemFree(self, address):
        allocation = self._blocks.pop(int(address), None)
        _require(allocation is not None)
        _libc.munmap(address, allocation.size)
        self._hold("block", -1)
        self._drop(allocation)

    @_driver_function
    def cuIpcGetMemHandle(self, address):
        allocation = self._blocks[int(address)]
        handle = real.CUipcMemHandle()
        ctypes.memset(int(handle.getPtr()), 0, 64)
        data = _IPC.pack(b"fake-ipc", os.getpid(), allocation.fd, allocation.size)
        ctypes.memmove(int(handle.getPtr()), data, len(data))
        return handle

    @_driver_function
    def cuIpcOpenMemHandle(self, handle, flags):
        self._needs_context()
        data = ctypes.string_at(int(handle.getPtr()), 64)
        magic, pid, fd, size = _IPC.unpack(data[: _IPC.size])
        _require(magic == b"fake-ipc", "CUDA_ERROR_INVALID_VALUE")
        _require(pid != os.getpid(), "CUDA_ERROR_INVALID_CONTEXT")
        again = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        address = _mmap(0, size, _READ | _WRITE, _SHARED, again)
        os.close(again)
        self._opened[address] = size
        self._hold("opened")
        return real.CUdeviceptr(address)

    @_driver_function
    def cuIpcCloseMemHandle(self, address):
        size = self._opened.pop(int(address), None)
        _require(size is not None)
        _libc.munmap(address, size)
        self._hold("opened", -1)

    @_driver_function
    def cuMemGetAddressRange(self, address):
        return address, self._opened[int(address)]

    # ------------------------------------------------------------ copies

    @_driver_function
    def cuMemsetD8(self, address, value, size):
        self._needs_context()
        ctypes.memset(int(address), value, size)

    @_driver_function
    def cuMemHostAlloc(self, size, flags):
        self._needs_context()
        buffer = ctypes.create_string_buffer(size)
        self._host[ctypes.addressof(buffer)] = buffer
        self._hold("pinned")
        return ctypes.addressof(buffer)

    @_driver_function
    def cuMemFreeHost(self, address):
        buffer = self._host.pop(int(address), None)
        _require(buffer is not None)
        end = address + len(buffer)
        for copies in self._streams.values():
            if any(address <= source < end for _, source, _ in copies):
                self.violations.append("pinned memory freed while it is copied")
        self._hold("pinned", -1)

    @_driver_function
    def cuStreamCreate(self, flags):
        stream = next(self._ids)
        self._streams[stream] = []
        self._hold("stream")
        return real.CUstream(stream)

    @_driver_function
    def cuStreamDestroy(self, stream):
        copies = self._streams.pop(int(stream), None)
        _require(copies is not None)
        if copies:
            self.violations.append("stream destroyed before its copies were waited for")
        self._hold("stream", -1)

    @_driver_function
    def cuStreamSynchronize(self, stream):
        copies = self._streams[int(stream)]
        for target, source, size in copies:
            ctypes.memmove(target, source, size)
        copies.clear()

    @_driver_function
    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        self._needs_context()
        self._streams[int(stream)].append((int(target), int(source), size))
