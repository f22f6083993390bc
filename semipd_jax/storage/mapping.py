"""A worker's end: asks the memory owner for the regions and maps them until the process ends."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from semipd_jax.config import Platform
from semipd_jax.errors import StartupError
from semipd_jax.storage.backend import backend
from semipd_jax.storage.manifest import Region, SharingError, check
from semipd_jax.storage.server import HEADER, check_peer, socket_path

_MAX_MANIFEST_BYTES: Final = 64 << 20
_MAX_REGIONS: Final = 16


@dataclass(frozen=True, slots=True)
class MappedRegion:
    """A region at `base` in this process's address space."""

    region: Region
    base: int
    platform: Platform

    def address(self, path: str) -> int:
        return self.base + self.region.entry(path).offset


def map_regions(run_dir: str, platform: Platform, timeout_s: float) -> dict[str, MappedRegion]:
    """Maps every region of the memory owner that serves in `run_dir`, by name.

    Raises StartupError if the owner does not answer, SharingError if the memory is not what its
    manifest says.
    """
    path = socket_path(run_dir)
    fds: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(path)
            check_peer(connection)
            regions = _receive(connection, fds)
        if len({region.name for region in regions}) < len(regions):
            raise SharingError("the memory owner sent two regions of one name")
        for region in regions:
            check(region)
        return {
            region.name: MappedRegion(region, backend(platform).map_region(region, fd), platform)
            for region, fd in zip(regions, fds, strict=True)
        }
    except OSError as error:
        raise StartupError(f"no memory from the memory owner at {path}: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


def _receive(connection: socket.socket, fds: list[int]) -> Sequence[Region]:
    """Reads one answer. The descriptors go to `fds`, to be closed also if this raises."""
    header, received, flags, _ = socket.recv_fds(
        connection, HEADER.size, _MAX_REGIONS, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL
    )
    fds.extend(received)
    if flags & socket.MSG_CTRUNC:
        raise SharingError(f"the memory owner sent more than {_MAX_REGIONS} descriptors")
    if len(header) < HEADER.size:
        raise SharingError("the memory owner refused or ended before it sent the memory")
    (length,) = HEADER.unpack(header)
    if length > _MAX_MANIFEST_BYTES:
        raise SharingError(f"the manifest is {length} B long; allowed: {_MAX_MANIFEST_BYTES}")
    try:
        regions = msgspec.json.decode(_read(connection, length), type=list[Region])
    except msgspec.DecodeError as error:
        raise SharingError(f"damaged manifest: {error}") from error
    if len(regions) != len(fds):
        raise SharingError(f"{len(fds)} descriptors for {len(regions)} regions")
    return regions


def _read(connection: socket.socket, length: int) -> bytes:
    manifest = bytearray()
    while len(manifest) < length:
        part = connection.recv(min(length - len(manifest), 1 << 20))
        if not part:
            raise SharingError(f"the manifest ends after {len(manifest)} of {length} B")
        manifest += part
    return bytes(manifest)
