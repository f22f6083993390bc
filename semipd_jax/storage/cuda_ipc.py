"""Device memory shared by a legacy IPC handle: 64 bytes that another process opens.

The handle travels in a sealed memory file, so that every region comes with one descriptor. Unlike
memory shared by descriptor, this ends with the process that allocated it.
"""

import contextlib
import ctypes
import fcntl
import os
from typing import Final

from semipd_jax.cuda_driver import bindings, call
from semipd_jax.storage.manifest import Region, SharingError

_HANDLE_BYTES: Final = 64
_GRANULARITY: Final = 2 << 20
"""The driver packs smaller allocations into one block, and a handle opens the whole block."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class IpcMemory:
    """`num_bytes`, rounded up, at `address` in this process; others open what `fd` holds."""

    def __init__(self, num_bytes: int, device: int) -> None:
        self.num_bytes = -(-num_bytes // _GRANULARITY) * _GRANULARITY
        with contextlib.ExitStack() as undo:
            self.address = int(call("cuMemAlloc", self.num_bytes))
            undo.callback(call, "cuMemFree", self.address)
            handle = call("cuIpcGetMemHandle", self.address)
            self.fd = os.memfd_create("semipd-ipc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, self.fd)
            os.write(self.fd, ctypes.string_at(int(handle.getPtr()), _HANDLE_BYTES))
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._undo = undo.pop_all()

    def close(self) -> None:
        self._undo.close()


def attach(region: Region, fd: int) -> int:
    """Opens the memory until the process ends and returns its address.

    Raises SharingError if `fd` holds no handle or the memory is smaller than the region, CudaError
    if the driver refuses; nothing is left behind.
    """
    data = os.pread(fd, _HANDLE_BYTES + 1, 0)
    if len(data) != _HANDLE_BYTES:
        raise SharingError(f"region {region.name!r}: no IPC handle in its descriptor")
    cu = bindings()
    handle = cu.CUipcMemHandle()
    ctypes.memmove(int(handle.getPtr()), data, _HANDLE_BYTES)
    lazy_peer = int(cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
    with contextlib.ExitStack() as undo:
        address = int(call("cuIpcOpenMemHandle", handle, lazy_peer))
        undo.callback(call, "cuIpcCloseMemHandle", address)
        base, size = (int(value) for value in call("cuMemGetAddressRange", address))
        if base + size < address + region.num_bytes:
            raise SharingError(
                f"region {region.name!r}: {base + size - address} B, "
                f"manifest says {region.num_bytes} B"
            )
        undo.pop_all()
    return address
