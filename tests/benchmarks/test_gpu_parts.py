"""Parts of the GPU check on a CPU: the same processes, on host memory and cores."""

import dataclasses

import pytest

from benchmarks.gpu import storage
from benchmarks.gpu.peers import PeerError, peers
from benchmarks.gpu.shares import Gemm, check_interference, check_shares
from benchmarks.gpu.storage import check_sharing
from semipd_jax.storage.cpu import HostMemory


def test_two_processes_share_host_memory() -> None:
    result = check_sharing("memfd", {}, num_rows=1024, num_steps=50)
    assert result.failures == ()
    assert result.passed
    assert len(result.step_us) == 2
    assert min(result.step_us) > 0


def test_memory_that_is_not_shared_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that asks gets memory of its own."""

    class Server(storage.MemoryServer):
        def answer(self) -> None:
            self._fds = [HostMemory(region).fd for region in regions]
            super().answer()

    regions = []
    reserve = storage.cpu.HostMemories.reserve
    monkeypatch.setattr(
        storage.cpu.HostMemories,
        "reserve",
        lambda self, region: regions.append(region) or reserve(self, region),
    )
    monkeypatch.setattr(storage, "MemoryServer", Server)
    result = check_sharing("memfd", {}, num_rows=1024, num_steps=5)
    assert not result.passed
    assert result.failures[0].startswith("turn 1: the other process read [0.0")


def test_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.cuda, "open_memory", _no_gpu)
    result = check_sharing("vmm", {"mps": "off"})
    assert result.failures == ("no NVIDIA driver is here",)


def _no_gpu(**_: object) -> None:
    raise storage.EngineError("no NVIDIA driver is here")


def test_shares_and_interference_on_cores() -> None:
    gemms = {"prefill": Gemm(64, 128, 256), "decode": Gemm(4, 128, 256)}
    alone = check_shares("cpu", {}, [0.5, 1.0], gemms=gemms, seconds=0.05)
    assert [(r.phase, r.share) for r in alone] == [
        *(("prefill", 0.5), ("prefill", 1.0)),
        *(("decode", 0.5), ("decode", 1.0)),
    ]
    assert all("cores" in r.grant and r.gemm_us > 0 for r in alone)
    both = check_interference("cpu", {}, alone[1::2], gemms=gemms, seconds=0.05)
    (pair,) = both
    assert (pair.prefill_share, pair.decode_share) == (1.0, 1.0)
    assert pair.prefill_slowdown == pair.prefill_us / alone[1].gemm_us
    assert dataclasses.asdict(pair)["decode_us"] > 0


def test_a_peer_that_ends_is_named() -> None:
    with (
        peers("benchmarks.gpu.no_such_module", [{}]) as (peer,),
        pytest.raises(PeerError, match="no_such_module ended with status 1"),
    ):
        peer.hear()
