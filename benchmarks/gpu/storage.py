"""Does memory that one process owns stay shared while two others write to it?

Two peers map one pool and update it by donation: turn by turn, then both at once, each in rows of
its own. Every array must stay at its address, each peer must see the other's rows, both must leave
cleanly, and the memory must come back.
"""

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.gpu.part import Outcome, Setting
from benchmarks.gpu.peers import PeerError, answer, answering, orders, peers
from semipd_jax import cuda_driver
from semipd_jax.config import MpsMode, Platform, ShareConfig
from semipd_jax.errors import EngineError
from semipd_jax.shares import backend as shares
from semipd_jax.storage import cpu, cuda
from semipd_jax.storage.backend import Reservation
from semipd_jax.storage.manifest import STATE, Sharing, lay_out
from semipd_jax.storage.server import MemoryServer

_MODULE: Final = "benchmarks.gpu.storage"
NUM_TURNS: Final = 10
NUM_STEPS: Final = 1000
_WIDTH: Final = 2048
_SLACK_BYTES: Final = 32 << 20
"""Free memory may differ by this much before it counts as lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingResult:
    """`step_us`: mean time of a donated step in each process, while both write.
    `lost_bytes`: less free memory afterwards than before."""

    sharing: Sharing
    with_mps: bool
    failures: tuple[str, ...]
    num_steps: int = 0
    step_us: tuple[float, ...] = ()
    lost_bytes: int = 0

    @property
    def passed(self) -> bool:
        return not self.failures


def run(setting: Setting) -> Outcome:
    """Each way in a process of its own: a process starts CUDA once, in or outside of MPS."""
    if setting.is_rehearsal:
        wanted: list[tuple[Sharing, MpsMode]] = [("memfd", "off")]
    else:
        wanted = [(sharing, mps) for sharing in ("vmm", "ipc") for mps in ("off", "on")]
    found: list[str] = []
    results: list[dict[str, Any]] = []
    for sharing, mps in wanted:
        setup = asdict(setting) | {"sharing": sharing, "mps": mps}
        with peers(_MODULE, [setup]) as (owner,):
            result = owner.hear()
            owner.end()
        results.append(result)
        name = f"{sharing}, {'with' if mps == 'on' else 'without'} MPS"
        steps = " and ".join(f"{us:.0f}" for us in result["step_us"])
        found += [f"{name}: {failure}" for failure in result["failures"]] or [
            f"{name}: {result['num_steps']} donated steps in place in each of two processes at "
            f"once, {steps} us each"
        ]
    passed = not any(result["failures"] for result in results)
    return Outcome(passed, tuple(found), {"results": results})


def main() -> None:
    """In the process of one way: it is told which."""
    setup = next(orders())
    is_rehearsal = setup["platform"] == "cpu"
    sizes = {"num_rows": 1024, "num_steps": 100} if is_rehearsal else {}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="semipd-") as run_dir,
            shares.host(
                setup["platform"], ShareConfig(mps=setup["mps"]), run_dir, setup["num_sms"]
            ) as terms,
        ):
            result = check_sharing(setup["sharing"], terms, **sizes)
    except EngineError as error:
        is_on = setup["mps"] == "on"
        result = SharingResult(sharing=setup["sharing"], with_mps=is_on, failures=(str(error),))
    answer(**asdict(result))


def check_sharing(
    sharing: Sharing,
    terms: Mapping[str, str],
    *,
    num_rows: int = 1 << 16,
    num_steps: int = NUM_STEPS,
) -> SharingResult:
    """One way of sharing, between processes that live on the `terms` of `shares.host`."""
    platform: Platform = "cpu" if sharing == "memfd" else "cuda"
    with_mps = terms.get("mps", "off") != "off"
    lost_bytes, failures, times = 0, [], ()
    try:
        with tempfile.TemporaryDirectory(prefix="semipd-") as run_dir, contextlib.ExitStack() as at:
            shares.abstain(platform, run_dir)
            memory = at.enter_context(
                cpu.open_memory() if sharing == "memfd" else cuda.open_memory(sharing=sharing)
            )
            before = _free_bytes(platform)
            region = lay_out(STATE, [("pool", (num_rows, _WIDTH), "bfloat16")], writable=True)
            reservation = memory.reserve(region)
            times, failures = _exercise(platform, run_dir, reservation, terms, num_rows, num_steps)
            reservation.close()
            lost_bytes = before - _free_bytes(platform)
    except (EngineError, PeerError) as error:
        failures = [str(error)]
    if lost_bytes > _SLACK_BYTES:
        failures.append(f"{lost_bytes} B did not come back")
    return SharingResult(
        sharing=sharing,
        with_mps=with_mps,
        failures=tuple(failures),
        num_steps=num_steps,
        step_us=tuple(times),
        lost_bytes=lost_bytes,
    )


def _exercise(
    platform: Platform,
    run_dir: str,
    memory: Reservation,
    terms: Mapping[str, str],
    num_rows: int,
    num_steps: int,
) -> tuple[tuple[float, ...], list[str]]:
    """Mean step times, and what went wrong."""
    failures: list[str] = []

    def expect(ok: bool, failure: str) -> None:
        if not ok:
            failures.append(failure)

    setups = [
        {"run_dir": run_dir, "platform": platform, "phase": phase, "terms": dict(terms)}
        for phase in ("prefill", "decode")
    ]
    half = num_rows // 2
    with (
        contextlib.closing(MemoryServer(run_dir, [memory])) as server,
        answering(server),
        peers("benchmarks.gpu.storage_peer", setups) as pair,
    ):
        for peer in pair:
            expect(peer.hear()["is_zero"], "the pool did not start as zeros")
        for turn in range(1, NUM_TURNS + 1):
            writer, reader = pair if turn % 2 else pair[::-1]
            row = 8 * turn + (0 if turn % 2 else half)
            wrote = writer.ask(do="write", row=row, value=turn, times=1)
            expect(wrote["in_place"], f"turn {turn}: the array left the pool")
            seen = reader.ask(do="read", row=row)["values"]
            expect(seen == [turn] * 8, f"turn {turn}: the other process read {seen}")
        for value, peer in enumerate(pair, 3):
            peer.tell(do="write", row=(value - 3) * half, value=value, times=num_steps)
        wrote = [peer.hear() for peer in pair]
        expect(all(w["in_place"] for w in wrote), "an array left the pool while both wrote")
        for value, (row, peer) in enumerate(zip((0, half), pair[::-1], strict=True), 3):
            seen = peer.ask(do="read", row=row)["values"]
            expect(seen == [value] * 8, f"after both wrote, {seen} was read for {value}")
        expect([peer.end() for peer in pair] == [0, 0], "a process did not leave cleanly")
    return tuple(w["step_us"] for w in wrote), failures


def _free_bytes(platform: Platform) -> int:
    """Free device memory. Host memory is not compared: others use it as well."""
    return 0 if platform == "cpu" else int(cuda_driver.call("cuMemGetInfo")[0])


if __name__ == "__main__":
    main()
