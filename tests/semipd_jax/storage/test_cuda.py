"""Device memory, against a driver that keeps the rules (`fake_cuda_driver`), over real sockets."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest
from fake_cuda_driver import GRANULARITY, MODULE, FakeDriver

from semipd_jax import cuda_driver
from semipd_jax.cuda_driver import CudaError, DeviceInfo, describe
from semipd_jax.errors import EngineError, StartupError
from semipd_jax.storage import cuda
from semipd_jax.storage.arrays import view
from semipd_jax.storage.backend import Memory, Reservation, backend, worker_environment
from semipd_jax.storage.cuda import CONTEXT_BYTES, open_memory
from semipd_jax.storage.manifest import SharingError, lay_out
from semipd_jax.storage.mapping import MappedRegion, map_regions
from semipd_jax.storage.server import MemoryServer

type Serving = Callable[..., AbstractContextManager[None]]

GIB = 1 << 30
WEIGHTS = lay_out(
    "weights",
    [("a", (300,), "float32"), ("b", (5, 2000), "bfloat16"), ("c", (7, 3), "int32")],
)
STATE = lay_out("state", [("tokens", (3, 40), "int32")], writable=True)
NO_IPC = {"cuIpcGetMemHandle": "CUDA_ERROR_NOT_SUPPORTED"}
NO_VMM = {"cuMemCreate": "CUDA_ERROR_NOT_SUPPORTED"}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    driver.install(monkeypatch)
    return driver


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def contents(path: str) -> np.ndarray:
    entry = WEIGHTS.entry(path)
    rng = np.random.default_rng(len(path) + entry.num_bytes)
    return rng.integers(1, 100, entry.shape).astype(entry.dtype)


def load(memory: cuda.CudaMemory) -> tuple[cuda.CudaReservation, cuda.CudaReservation]:
    """What the memory owner does."""
    weights, state = memory.reserve(WEIGHTS), memory.reserve(STATE)
    for entry in WEIGHTS.arrays:
        with weights.writing(entry.path) as out:
            assert (out.shape, out.dtype) == (entry.shape, entry.dtype)
            out[...] = contents(entry.path)
    weights.finish()
    return weights, state


def device_view(mapped: MappedRegion, path: str) -> np.ndarray:
    entry = mapped.region.entry(path)
    data = (ctypes.c_uint8 * entry.num_bytes).from_address(mapped.address(path))
    return np.frombuffer(data, entry.dtype).reshape(entry.shape)


# ---------------------------------------------------------------- the driver


def test_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriver:
        def cuInit(self, flags: int) -> None:  # noqa: N802
            raise RuntimeError("libcuda.so.1 is nowhere")

    monkeypatch.setitem(sys.modules, MODULE, NoDriver())  # type: ignore[arg-type]
    monkeypatch.setattr(cuda_driver, "bindings", cuda_driver.bindings.__wrapped__)
    with (
        pytest.raises(StartupError, match=r"no NVIDIA driver is here: libcuda.so.1 is nowhere"),
        open_memory(),
    ):
        pass


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)  # type: ignore[arg-type]
    monkeypatch.setattr(cuda_driver, "bindings", cuda_driver.bindings.__wrapped__)
    with pytest.raises(StartupError, match=r"install semipd-jax\[cuda13\]"):
        describe(0)


def test_failed_call_is_named(driver: FakeDriver) -> None:
    with pytest.raises(CudaError, match="cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE") as e:
        describe(3)
    assert (e.value.call, e.value.result) == ("cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE")


def test_description_needs_no_context(driver: FakeDriver) -> None:
    assert cuda_driver.describe_all() == [DeviceInfo(0, "Fake GPU", 132, GIB, 13010)]
    assert not driver.live


# ---------------------------------------------------------------- the owner


def test_owner_and_workers_share_device_memory(
    driver: FakeDriver, run_dir: str, serving: Serving
) -> None:
    with open_memory() as memory:
        weights, state = load(memory)
        assert [r.region.sharing for r in (weights, state)] == ["vmm", "vmm"]
        assert weights.region.num_bytes % GRANULARITY == 0
        assert not any(os.get_inheritable(r.fd) for r in (weights, state))
        with serving(run_dir, weights, state):
            mapped = map_regions(run_dir, "cuda", 10.0)
        for entry in WEIGHTS.arrays:
            assert mapped["weights"].address(entry.path) % 256 == 0
            assert np.array_equal(device_view(mapped["weights"], entry.path), contents(entry.path))
        tokens = device_view(mapped["state"], "tokens")
        assert not tokens.any()
        tokens[...] = 5
        with serving(run_dir, weights, state):
            again = map_regions(run_dir, "cuda", 10.0)
        assert (device_view(again["state"], "tokens") == 5).all()


def test_everything_is_given_back_in_order(driver: FakeDriver) -> None:
    fds = open_fds()
    with open_memory() as memory:
        load(memory)
        assert driver.live["mapping"] == 2
        start = len(driver.calls)
    assert driver.calls[start:] == [
        *("cuMemUnmap", "cuMemRelease", "cuMemAddressFree") * 2,
        "cuDevicePrimaryCtxRelease",
    ]
    assert not driver.live
    assert driver.used_bytes == 0
    assert driver.violations == []
    assert open_fds() == fds


def test_a_copy_may_run_while_the_next_array_is_read(driver: FakeDriver) -> None:
    """Two buffers; neither is overwritten before its copy has ended."""
    region = lay_out("r", [(str(i), (1000,), "int32") for i in range(7)])
    with open_memory() as memory:
        reservation = memory.reserve(region)
        waits = []
        for i in range(7):
            with reservation.writing(str(i)) as out:
                out[...] = i
            waits.append(driver.calls.count("cuStreamSynchronize"))
        assert driver.live["pinned"] == driver.live["stream"] == 2
        reservation.finish()
        assert driver.live["pinned"] == driver.live["stream"] == 0
        base = reservation._memory.address
        for entry in region.arrays:
            words = (ctypes.c_int32 * 1000).from_address(base + entry.offset)
            assert set(words) == {int(entry.path)}
    assert waits == list(range(1, 8))  # one each, of the buffer to be reused
    assert driver.violations == []


def test_array_that_failed_to_load_is_not_copied(driver: FakeDriver) -> None:
    with open_memory() as memory:
        weights = memory.reserve(WEIGHTS)
        with pytest.raises(ZeroDivisionError), weights.writing("a"):
            raise ZeroDivisionError
        weights.finish()
        assert "cuMemcpyHtoDAsync" not in driver.calls


KEPT = {
    "cuMemRelease": {"handle"},
    "cuMemUnmap": {"mapping", "addresses"},  # addresses in use are not given back
    "cuMemAddressFree": {"addresses"},
    "cuMemFree": {"block"},
    "cuMemFreeHost": {"pinned"},
    "cuStreamDestroy": {"stream"},
    "cuDevicePrimaryCtxRelease": {"context"},
}
"""What is left when the driver refuses to take it back."""


@pytest.mark.parametrize("refuses", [NO_IPC, NO_VMM], ids=["vmm", "ipc"])
def test_no_failing_call_leaves_anything_behind(
    monkeypatch: pytest.MonkeyPatch, run_dir: str, refuses: dict[str, str]
) -> None:
    """Every call of the owner fails once, one run for each."""

    def owner(fail_at: int) -> FakeDriver:
        driver = FakeDriver(refuses=refuses, fail_at=fail_at)
        driver.install(monkeypatch)
        with contextlib.suppress(EngineError), open_memory() as memory:
            memory.budget(0.9, 2, 1 << 20)
            load(memory)
        return driver

    calls = owner(-1).calls
    assert len(calls) > 40
    fds = open_fds()
    for fail_at, name in enumerate(calls):
        driver = owner(fail_at)
        assert set(driver.live) == KEPT.get(name, set()), (fail_at, name)
        if name != "cuStreamSynchronize":  # copies that cannot be waited for are lost
            assert driver.violations == []
        if name not in KEPT:
            assert driver.used_bytes == 0
            assert open_fds() == fds
        fds = open_fds()


def test_no_failing_call_of_a_worker_leaves_a_mapping_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = FakeDriver()
    owner.install(monkeypatch)
    with open_memory() as memory:
        state = memory.reserve(STATE)

        def worker(fail_at: int) -> FakeDriver:
            driver = FakeDriver(fail_at=fail_at)
            driver.install(monkeypatch)
            with contextlib.suppress(EngineError):
                backend("cuda").map_region(state.region, state.fd)
            return driver

        good = worker(-1)
        assert good.live == {"context": 1, "addresses": 1, "mapping": 1}
        for fail_at, name in enumerate(good.calls[:-1]):
            left = worker(fail_at).live
            assert set(left) <= {"context"}, (name, left)
        owner.install(monkeypatch)


def test_memory_that_does_not_fit_is_an_error_and_leaves_the_rest(driver: FakeDriver) -> None:
    driver.total_bytes = 3 * GRANULARITY
    with open_memory() as memory:
        weights = memory.reserve(WEIGHTS)
        with pytest.raises(CudaError, match="cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY"):
            memory.reserve(msgspec.structs.replace(STATE, num_bytes=3 * GRANULARITY))
        assert driver.live == {"context": 1, "addresses": 1, "mapping": 1, "handle": 1}
        assert weights.region.num_bytes == GRANULARITY
    assert not driver.live


def test_budget_leaves_room_for_what_is_there_and_for_workers(driver: FakeDriver) -> None:
    driver.total_bytes, driver.used_bytes = 80 * GIB, 3 * GIB
    with open_memory() as memory:
        budget = memory.budget(0.9, 4, GIB)
    expected = 72 * GIB - 3 * GIB - 4 * (CONTEXT_BYTES + GIB)
    assert 0 <= expected - budget.available_bytes < 64 << 20
    assert budget.pool_takes_rest
    assert budget.worker_fraction == 1 / 80
    assert "0.9 of 80.00 GiB" in budget.detail
    with open_memory() as memory:
        assert memory.budget(0.05, 4, GIB).available_bytes == 0


def test_cuda_keeps_the_interface(driver: FakeDriver) -> None:
    with open_memory() as memory:
        assert isinstance(memory, Memory)
        assert isinstance(memory.reserve(STATE), Reservation)


# ---------------------------------------------------------------- fallback


def test_fallback_is_chosen_by_trying_and_is_logged(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.refuses = NO_VMM
    with open_memory() as memory:
        assert memory.reserve(STATE).region.sharing == "ipc"
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert record.message == (
        "GPU memory is shared by ipc, because vmm: cuMemCreate failed with CUDA_ERROR_NOT_SUPPORTED"
    )


def test_no_way_to_share(driver: FakeDriver) -> None:
    driver.refuses = NO_VMM | NO_IPC
    match = r"cannot be shared: vmm: cuMemCreate .*; ipc: cuIpcGet"
    with pytest.raises(StartupError, match=match), open_memory():
        pass
    assert not driver.live


def test_device_in_use_by_others_alone_is_named(driver: FakeDriver) -> None:
    driver.refuses = {"cuDevicePrimaryCtxRetain": "CUDA_ERROR_DEVICE_UNAVAILABLE"}
    match = r"GPU 0 cannot be used: .*DEVICE_UNAVAILABLE"
    with pytest.raises(StartupError, match=match), open_memory():
        pass


WORKER = """
    import ctypes, os, sys
    import numpy as np
    from fake_cuda_driver import FakeDriver
    from semipd_jax.storage.mapping import map_regions

    FakeDriver().install()
    regions = map_regions(sys.argv[1], "cuda", 10.0)
    for path in ("a", "c"):
        entry = regions["weights"].region.entry(path)
        data = ctypes.string_at(regions["weights"].address(path), entry.num_bytes)
        print(np.frombuffer(data, entry.dtype).astype(np.int64).sum())
    ctypes.memset(regions["state"].address("tokens"), 1, 8)
    if "stray" in sys.argv:
        ctypes.memset(regions["weights"].address("a"), 1, 1)
"""


def run_worker(run_dir: str, *args: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKER), run_dir, *args],
        env=os.environ | {"PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("refuses", "sharing"), [(NO_IPC, "vmm"), (NO_VMM, "ipc")])
def test_another_process_attaches(
    driver: FakeDriver, run_dir: str, serving: Serving, refuses: dict[str, str], sharing: str
) -> None:
    driver.refuses = refuses
    with open_memory() as memory:
        weights, state = load(memory)
        assert weights.region.sharing == sharing
        with serving(run_dir, weights, state):
            done = run_worker(run_dir)
        assert done.stderr == ""
        assert done.stdout.split() == [str(int(contents(p).astype(int).sum())) for p in "ac"]
        base = state._memory.address
        assert ctypes.string_at(base, 12) == b"\1" * 8 + b"\0" * 4


def test_stray_write_to_weights_faults(driver: FakeDriver, run_dir: str, serving: Serving) -> None:
    with open_memory() as memory:
        weights, state = load(memory)
        with serving(run_dir, weights, state):
            assert run_worker(run_dir, "stray").returncode == -signal.SIGSEGV


def test_weights_are_mapped_writable_only_if_the_driver_knows_no_other_way(
    driver: FakeDriver, run_dir: str, serving: Serving
) -> None:
    driver.refuses = {"read-only": "CUDA_ERROR_NOT_SUPPORTED"}
    with open_memory() as memory:
        weights, state = load(memory)
        with serving(run_dir, weights, state):
            mapped = map_regions(run_dir, "cuda", 10.0)["weights"]
    assert np.array_equal(device_view(mapped, "a"), contents("a"))
    device_view(mapped, "a")[0] = 0


# ---------------------------------------------------------------- what must not be mapped


def test_region_larger_than_its_memory_is_refused(driver: FakeDriver) -> None:
    with open_memory() as memory:
        state = memory.reserve(STATE)
        larger = msgspec.structs.replace(state.region, num_bytes=2 * GRANULARITY)
        held = dict(driver.live)
        with pytest.raises(CudaError, match="cuMemMap failed with CUDA_ERROR_INVALID_VALUE"):
            backend("cuda").map_region(larger, state.fd)
        assert driver.live == held | {"context": held["context"] + 1}


def test_region_larger_than_its_ipc_block_is_refused(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.refuses = NO_VMM
    with open_memory() as memory:
        state = memory.reserve(STATE)
        larger = msgspec.structs.replace(state.region, num_bytes=GRANULARITY + 1)
        real_pid = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: real_pid + 1)  # a handle of another process
        monkeypatch.setattr(os, "open", lambda path, flags: os.dup(int(path.rsplit("/", 1)[1])))
        with pytest.raises(SharingError, match=f"{GRANULARITY} B, manifest says {GRANULARITY + 1}"):
            backend("cuda").map_region(larger, state.fd)
        assert driver.live["opened"] == 0


def test_descriptor_without_a_handle_is_refused(driver: FakeDriver, tmp_path: Path) -> None:
    region = msgspec.structs.replace(STATE, sharing="ipc")
    (tmp_path / "short").write_bytes(b"x" * 63)
    with open(tmp_path / "short", "rb") as file, pytest.raises(SharingError, match="no IPC handle"):
        backend("cuda").map_region(region, file.fileno())


def test_host_memory_is_not_mapped_as_device_memory(driver: FakeDriver) -> None:
    with pytest.raises(SharingError, match="shared by 'memfd', not by CUDA"):
        backend("cuda").map_region(STATE, 0)
    assert driver.calls == []


def test_manifest_with_an_unknown_way_of_sharing_is_refused(
    driver: FakeDriver, run_dir: str, answering: Callable[..., AbstractContextManager[None]]
) -> None:
    strange = msgspec.structs.replace(STATE, sharing="nvlink")  # type: ignore[arg-type]
    with open_memory() as memory:
        state = memory.reserve(STATE)
        state.region = strange
        with (
            contextlib.closing(MemoryServer(run_dir, [state])) as server,
            answering(server.answer),
            pytest.raises(SharingError, match="damaged manifest: Invalid enum value 'nvlink'"),
        ):
            map_regions(run_dir, "cuda", 10.0)


# ---------------------------------------------------------------- arrays


def test_view_is_imported_as_device_memory_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What jax is given: a CUDA tensor on the right device, with a deleter, copy=False."""
    raw = np.zeros(4096, np.uint8)
    address = raw.ctypes.data + -raw.ctypes.data % 256
    on_host = partial(view, address, (4, 8), "bfloat16", platform="cpu")
    from_dlpack = jax.dlpack.from_dlpack
    seen: list[Any] = []

    def import_as_if_it_were_here(exporter: Any, copy: bool | None) -> jax.Array:
        seen.append((exporter, exporter.__dlpack_device__(), copy))
        assert exporter.__dlpack__(stream=None) is not None
        monkeypatch.setattr(jax.dlpack, "from_dlpack", from_dlpack)
        return on_host()

    monkeypatch.setattr(jax.dlpack, "from_dlpack", import_as_if_it_were_here)
    array = view(address, (4, 8), "bfloat16", platform="cuda", device=3)
    assert array.unsafe_buffer_pointer() == address
    (exporter, device, copy) = seen[0]
    assert (device, copy) == ((2, 3), False)
    managed = exporter._managed
    assert managed.deleter
    assert managed.tensor.data == address
    assert [managed.tensor.shape[i] for i in range(2)] == [4, 8]
    assert (managed.tensor.dtype.code, managed.tensor.dtype.bits) == (4, 16)


# ---------------------------------------------------------------- a worker's environment


def test_environment_of_workers() -> None:
    assert worker_environment("cpu", None) == {"JAX_PLATFORMS": "cpu"}
    cuda_workers = worker_environment("cuda", 0.0625)
    assert cuda_workers["JAX_PLATFORMS"] == "cuda"
    assert cuda_workers["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert cuda_workers["XLA_CLIENT_MEM_FRACTION"] == "0.0625"
    assert cuda_workers["XLA_PYTHON_CLIENT_MEM_FRACTION"] is None
