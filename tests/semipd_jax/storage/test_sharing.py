"""Regions between real processes over a real socket. No jax."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from semipd_jax.errors import StartupError
from semipd_jax.storage import server
from semipd_jax.storage.cpu import HostMemory
from semipd_jax.storage.manifest import Region, SharingError, lay_out
from semipd_jax.storage.mapping import MappedRegion, map_regions
from semipd_jax.storage.server import HEADER, MemoryServer, socket_path

type Serving = Callable[..., AbstractContextManager[None]]

WEIGHTS = lay_out("weights", [("a", (300,), "float32"), ("b/c", (5, 2000), "int32")])
STATE = lay_out("state", [("tokens", (3, 40), "int32")], writable=True)


@contextlib.contextmanager
def saying(run_dir: str, data: bytes, fds: Sequence[int]) -> Iterator[None]:
    """A memory owner that answers one process with this."""

    def answer() -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(BrokenPipeError):
            socket.send_fds(client, [data], fds)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(socket_path(run_dir))
        listener.listen()
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield
        thread.join(10)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def host_view(mapped: MappedRegion, path: str) -> np.ndarray:
    entry = mapped.region.entry(path)
    data = (ctypes.c_uint8 * entry.num_bytes).from_address(mapped.address(path))
    return np.frombuffer(data, entry.dtype).reshape(entry.shape)


def fill(memory: HostMemory, path: str) -> np.ndarray:
    with memory.writing(path) as out:
        out[...] = np.arange(out.size).reshape(out.shape)
    return out.copy()


def test_memory_starts_as_zeros_and_has_a_fixed_size() -> None:
    memory = HostMemory(STATE)
    with memory.writing("tokens") as out:
        assert out.shape == (3, 40)
        assert not out.any()
    for size in (0, STATE.num_bytes + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)


def test_writing_leaves_no_mapping_behind() -> None:
    memory = HostMemory(lay_out("left-behind", [("a", (300,), "float32")]))
    with memory.writing("a") as out:
        out[...] = 1
        assert "left-behind" in Path("/proc/self/maps").read_text()
    del out
    assert "left-behind" not in Path("/proc/self/maps").read_text()


def test_another_process_sees_the_same_bytes_and_writes_back(
    run_dir: str, serving: Serving
) -> None:
    weights, state = HostMemory(WEIGHTS), HostMemory(STATE)
    expected = {path: fill(weights, path) for path in ("a", "b/c")}
    script = """
        import ctypes, sys
        import numpy as np
        from semipd_jax.storage.mapping import map_regions
        regions = map_regions(sys.argv[1], "cpu", 10.0)
        for path in ("a", "b/c"):
            entry = regions["weights"].region.entry(path)
            data = ctypes.string_at(regions["weights"].address(path), entry.num_bytes)
            print(np.frombuffer(data, entry.dtype).astype(np.int64).sum())
        ctypes.memset(regions["state"].address("tokens"), 1, 8)
    """
    with serving(run_dir, weights, state):
        done = run(script, run_dir)
    assert done.stdout.split() == [str(int(array.sum())) for array in expected.values()]
    with state.writing("tokens") as tokens:
        assert tokens.ravel()[:3].tolist() == [0x01010101, 0x01010101, 0]


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_stray_write_to_weights_kills_the_writer(run_dir: str, serving: Serving) -> None:
    script = """
        import ctypes, sys
        from semipd_jax.storage.mapping import map_regions
        ctypes.memset(map_regions(sys.argv[1], "cpu", 10.0)["weights"].address("a"), 1, 1)
    """
    memory = HostMemory(WEIGHTS)
    with serving(run_dir, memory):
        assert run(script, run_dir).returncode == -signal.SIGSEGV
    with memory.writing("a") as out:
        assert not out.any()


def test_mapping_opens_no_descriptors_beyond_its_regions(run_dir: str, serving: Serving) -> None:
    memories = HostMemory(WEIGHTS), HostMemory(STATE)
    before = open_fds()
    with serving(run_dir, *memories):
        regions = map_regions(run_dir, "cpu", 10.0)
    kept = open_fds() - before
    assert len(kept) == len(regions)  # a mapping holds one descriptor
    assert not any(os.get_inheritable(int(fd)) for fd in kept)
    assert host_view(regions["state"], "tokens").shape == (3, 40)


def refused(run_dir: str, data: bytes, fds: Sequence[int], match: str) -> None:
    before = open_fds()
    with saying(run_dir, data, fds), pytest.raises(SharingError, match=match):
        map_regions(run_dir, "cpu", 10.0)
    assert open_fds() <= before


def answer(*regions: Region) -> bytes:
    manifest = msgspec.json.encode(regions)
    return HEADER.pack(len(manifest)) + manifest


def test_refuses_an_answer_that_ends_early(run_dir: str) -> None:
    memory = HostMemory(STATE)
    refused(run_dir, answer(STATE)[:-1], [memory.fd], r"ends after \d+ of \d+ B")
    os.unlink(socket_path(run_dir))
    refused(run_dir, answer(STATE)[:3], [memory.fd], "before it sent the memory")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (HEADER.pack(2**32 - 1), "manifest is 4294967295 B long"),
        (HEADER.pack(3) + b"[{]", "damaged manifest"),
        (HEADER.pack(4) + b'["a"', "damaged manifest"),
        (answer(), "1 descriptors for 0 regions"),
        (answer(STATE, WEIGHTS), "1 descriptors for 2 regions"),
        (answer(msgspec.structs.replace(STATE, num_bytes=479)), "too small"),
        (answer(msgspec.structs.replace(STATE, num_bytes=4096)), "480 B, manifest says 4096 B"),
    ],
    ids=["long", "no json", "wrong type", "extra", "missing", "array outside", "other size"],
)
def test_refuses_a_manifest_that_is_wrong(run_dir: str, data: bytes, match: str) -> None:
    refused(run_dir, data, [HostMemory(STATE).fd], match)


def test_refuses_two_regions_of_one_name(run_dir: str) -> None:
    fds = [HostMemory(STATE).fd, HostMemory(STATE).fd]
    refused(run_dir, answer(STATE, STATE), fds, "two regions of one name")


def test_refuses_more_descriptors_than_it_expects(run_dir: str) -> None:
    refused(run_dir, answer(STATE), [HostMemory(STATE).fd] * 17, "more than 16 descriptors")


def test_refuses_memory_that_can_shrink(run_dir: str, tmp_path: Path) -> None:
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for fd, match in ((unsealed, "can change its size"), (file, "not a memory file")):
        os.ftruncate(fd, STATE.num_bytes)
        refused(run_dir, answer(STATE), [fd], match)
        os.unlink(socket_path(run_dir))
        os.close(fd)


def test_refuses_an_owner_of_another_user(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    refused(run_dir, answer(STATE), [HostMemory(STATE).fd], "not to 4711")


def test_another_user_gets_no_memory(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        contextlib.closing(MemoryServer(run_dir, [HostMemory(STATE)])) as memory_server,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(socket_path(run_dir))
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        memory_server.answer()
        assert socket.recv_fds(client, 100, 10)[:2] == (b"", [])
    assert f"process {os.getpid()} belongs to user" in caplog.text


def test_run_dir_must_be_private(run_dir: str) -> None:
    os.chmod(run_dir, 0o750)
    with pytest.raises(ValueError, match="mode 0700"):
        MemoryServer(run_dir, [])


def test_process_that_does_not_read_is_dropped(
    run_dir: str,
    serving: Serving,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(server, "_CLIENT_TIMEOUT_S", 1.0)
    paths = ("/".join([str(i)] * 50) for i in range(5000))  # more than a socket's buffer
    memory = HostMemory(lay_out("state", [(path, (1,), "int32") for path in paths]))
    with serving(run_dir, memory, times=2), socket.socket(socket.AF_UNIX) as lazy:
        lazy.connect(socket_path(run_dir))
        deadline = time.monotonic() + 60
        while "timed out" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.setattr(server, "_CLIENT_TIMEOUT_S", 60.0)
        assert map_regions(run_dir, "cpu", 60.0)["state"].region == memory.region


def test_no_owner(run_dir: str) -> None:
    with pytest.raises(StartupError, match="No such file"):
        map_regions(run_dir, "cpu", 10.0)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(socket_path(run_dir))
        silent.listen()
        with pytest.raises(StartupError, match="timed out"):
            map_regions(run_dir, "cpu", 0.1)
    with pytest.raises(StartupError, match="refused"):
        map_regions(run_dir, "cpu", 10.0)
