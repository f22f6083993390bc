"""What does a share of the compute cost and keep? Visible SMs, GEMM times, and interference.

All functions take the `terms` of `shares.host`, so they run on a CPU as well, where cores are
shared.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from benchmarks.gpu.part import Outcome, Setting
from benchmarks.gpu.peers import peers
from semipd_jax.config import Platform, ShareConfig
from semipd_jax.messages import Phase
from semipd_jax.shares.backend import host

SHARES: Final = (0.2, 0.4, 0.6, 0.8, 1.0)
_SECONDS: Final = 2.0
_MODULE: Final = "benchmarks.gpu.shares_peer"


@dataclass(frozen=True, slots=True)
class Gemm:
    """[rows, inner] @ [inner, columns] in bfloat16."""

    rows: int
    inner: int
    columns: int


GEMMS: Final[Mapping[Phase, Gemm]] = {
    "prefill": Gemm(2048, 4096, 28672),  # the gate and up projections of an 8B model, one chunk
    "decode": Gemm(64, 4096, 28672),
}

_REHEARSAL: Final[Mapping[Phase, Gemm]] = {
    "prefill": Gemm(64, 128, 256),
    "decode": Gemm(4, 128, 256),
}


@dataclass(frozen=True, slots=True)
class ShareResult:
    """One phase alone at one share. `grant` is what the process says that it may use."""

    phase: Phase
    share: float
    gemm_us: float
    grant: str


@dataclass(frozen=True, slots=True)
class InterferenceResult:
    """Both phases at once. Slowdowns are against the same share alone."""

    prefill_share: float
    decode_share: float
    prefill_us: float
    decode_us: float
    prefill_slowdown: float
    decode_slowdown: float


def run(setting: Setting) -> Outcome:
    """Fails if a share is not kept: each process verifies its own."""
    sizes = _REHEARSAL if setting.is_rehearsal else GEMMS
    shares = (0.5, 1.0) if setting.is_rehearsal else SHARES
    seconds = 0.1 if setting.is_rehearsal else _SECONDS
    with (
        tempfile.TemporaryDirectory(prefix="semipd-") as run_dir,
        host(setting.platform, ShareConfig(mps="on"), run_dir, setting.num_sms) as terms,
    ):
        alone = check_shares(setting.platform, terms, shares, gemms=sizes, seconds=seconds)
        both = check_interference(setting.platform, terms, alone, gemms=sizes, seconds=seconds)
    details = {"alone": [asdict(r) for r in alone], "interference": [asdict(r) for r in both]}
    return Outcome(True, tuple(_in_words(alone, both)), details)


def _in_words(
    alone: Sequence["ShareResult"], both: Sequence["InterferenceResult"]
) -> Iterator[str]:
    for phase in GEMMS:
        mine = [result for result in alone if result.phase == phase]
        whole_us = mine[-1].gemm_us
        times = ", ".join(f"{r.share:g}: {r.gemm_us / whole_us:.2f}x ({r.grant})" for r in mine)
        yield f"{phase} GEMM against its time at {mine[-1].share:g}, {whole_us:.0f} us: {times}"
    worst_prefill = max(both, key=lambda r: r.prefill_slowdown)
    worst_decode = max(both, key=lambda r: r.decode_slowdown)
    for phase, r, factor in (
        ("prefill", worst_prefill, worst_prefill.prefill_slowdown),
        ("decode", worst_decode, worst_decode.decode_slowdown),
    ):
        at = f"prefill {r.prefill_share:g}, decode {r.decode_share:g}"
        yield f"both at once: {phase} is slowed down most, {factor:.2f}x, at {at}"


def check_shares(
    platform: Platform,
    terms: Mapping[str, str],
    shares: Sequence[float] = SHARES,
    *,
    gemms: Mapping[Phase, Gemm] = GEMMS,
    seconds: float = _SECONDS,
) -> list[ShareResult]:
    """GEMM time against share, one process at a time.

    Raises PeerError if a process ends, for instance because its share is not kept and mps is "on".
    """
    results: list[ShareResult] = []
    for phase, gemm in gemms.items():
        for share in shares:
            with peers(_MODULE, [_setup(platform, terms, phase, share, gemm)]) as (peer,):
                grant = peer.hear()["grant"]
                time_us = peer.ask(seconds=seconds)["gemm_us"]
                peer.end()
            results.append(ShareResult(phase, share, time_us, grant))
    return results


def check_interference(
    platform: Platform,
    terms: Mapping[str, str],
    alone: Sequence[ShareResult],
    *,
    gemms: Mapping[Phase, Gemm] = GEMMS,
    seconds: float = _SECONDS,
) -> list[InterferenceResult]:
    """Every pair of the shares that `check_shares` measured `alone`."""
    alone_us = {(result.phase, result.share): result.gemm_us for result in alone}
    shares = sorted({result.share for result in alone})
    results: list[InterferenceResult] = []
    for prefill_share in shares:
        for decode_share in shares:
            wanted: list[tuple[Phase, float]] = [
                ("prefill", prefill_share),
                ("decode", decode_share),
            ]
            setups = [_setup(platform, terms, p, share, gemms[p]) for p, share in wanted]
            with peers(_MODULE, setups) as pair:
                for peer in pair:
                    peer.hear()
                for peer in pair:
                    peer.tell(seconds=seconds)
                times = [peer.hear()["gemm_us"] for peer in pair]
                for peer in pair:
                    peer.end()
            slowdowns = [t / alone_us[key] for t, key in zip(times, wanted, strict=True)]
            results.append(InterferenceResult(prefill_share, decode_share, *times, *slowdowns))
    return results


def _setup(
    platform: Platform, terms: Mapping[str, str], phase: Phase, share: float, gemm: Gemm
) -> dict[str, object]:
    return {
        "platform": platform,
        "terms": dict(terms),
        "phase": phase,
        "share": share,
        "shape": [gemm.rows, gemm.inner, gemm.columns],
    }
