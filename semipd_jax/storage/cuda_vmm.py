"""Device memory shared by a file descriptor: the driver's virtual memory management.

The memory lives while any process maps it or holds a descriptor or handle of it.
"""

import contextlib
import os
from typing import Any, Final

from semipd_jax.cuda_driver import CudaError, bindings, call
from semipd_jax.storage.manifest import Region

_REFUSALS: Final = frozenset(("CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_INVALID_VALUE"))


class VmmMemory:
    """`num_bytes`, rounded up, at `address` in this process; others map it by `fd`."""

    def __init__(self, num_bytes: int, device: int) -> None:
        properties = _properties(device)
        step = granularity(device)
        self.num_bytes = -(-num_bytes // step) * step
        with contextlib.ExitStack() as undo:
            self.address = _reserve_addresses(undo, self.num_bytes)
            handle = call("cuMemCreate", self.num_bytes, properties, 0)
            undo.callback(call, "cuMemRelease", handle)
            _map(undo, self.address, self.num_bytes, handle)
            _allow(self.address, self.num_bytes, device, writable=True)
            self.fd = int(call("cuMemExportToShareableHandle", handle, _fd_type(), 0))
            undo.callback(os.close, self.fd)
            os.set_inheritable(self.fd, False)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Takes the memory from this process only: unmap, release, give the addresses back."""
        self._undo.close()


def attach(region: Region, fd: int) -> int:
    """Maps the memory behind `fd` until the process ends: read-only unless it is writable.

    Returns the address. The caller keeps `fd`. Raises CudaError and leaves nothing behind if the
    memory is smaller than the region.
    """
    with contextlib.ExitStack() as undo:
        handle = call("cuMemImportFromShareableHandle", fd, _fd_type())
        undo.callback(call, "cuMemRelease", handle)
        address = _reserve_addresses(undo, region.num_bytes)
        _map(undo, address, region.num_bytes, handle)
        try:
            _allow(address, region.num_bytes, region.device, writable=region.writable)
        except CudaError as error:
            if region.writable or error.result not in _REFUSALS:
                raise
            _allow(address, region.num_bytes, region.device, writable=True)
        undo.pop_all()
    call("cuMemRelease", handle)  # the mapping keeps the memory
    return address


def granularity(device: int) -> int:
    """Bytes that an allocation is a multiple of."""
    flags = bindings().CUmemAllocationGranularity_flags
    return int(
        call(
            "cuMemGetAllocationGranularity",
            _properties(device),
            flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
        )
    )


def _reserve_addresses(undo: contextlib.ExitStack, num_bytes: int) -> int:
    address = int(call("cuMemAddressReserve", num_bytes, 0, 0, 0))
    undo.callback(call, "cuMemAddressFree", address, num_bytes)
    return address


def _map(undo: contextlib.ExitStack, address: int, num_bytes: int, handle: Any) -> None:
    call("cuMemMap", address, num_bytes, 0, handle, 0)
    undo.callback(call, "cuMemUnmap", address, num_bytes)


def _allow(address: int, num_bytes: int, device: int, *, writable: bool) -> None:
    cu = bindings()
    access = cu.CUmemAccessDesc()
    access.location = _properties(device).location
    access.flags = (
        cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        if writable
        else cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    )
    call("cuMemSetAccess", address, num_bytes, [access], 1)


def _properties(device: int) -> Any:
    cu = bindings()
    properties = cu.CUmemAllocationProp()
    properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    properties.requestedHandleTypes = _fd_type()
    return properties


def _fd_type() -> Any:
    return bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
