"""Command-line flags that describe a load, a device and the engines to compare on it.

Those of `add_platform` and `add_engine` are None where they are not given, until `completed` has
seen that each of them has an effect.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from semipd_jax.config import PHASES, require
from semipd_jax.simulator import hardware, platform, traces, workloads
from semipd_jax.simulator.platform import Platform
from semipd_jax.simulator.systems import Setup
from semipd_jax.simulator.targets import TIGHT, multiple_of_alone
from semipd_jax.simulator.traces import TraceRow
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner import profile
from semipd_jax.tuner.policies import LADDERS
from semipd_jax.tuner.policy import Ladder, Ladders
from semipd_jax.tuner.slo import SloTargets

FLIPPING: Final = "flipping"
_KNOWN: Final = (*workloads.SYNTHETIC, FLIPPING)
_SYNTHETIC_MAX_LEN: Final = 8192
_TRACE_MAX_LEN: Final = 131072

_OF_MODELS: Final = {"hardware": "h100-llama-3-8b", "sharing": "conserving"}
_OF_PROFILES: Final = {"kv_tokens": None, "block_size": 16, "hop_ms": 1.0}
_OF_ALL: Final = {"host_ms": None, "noise": 0.03, "slo_factor": TIGHT}
_OF_ENGINES: Final = {
    "chunk_tokens": 1024,
    "whole_tokens": 8192,
    "max_num_seqs": 512,
    "ageing_tokens_per_s": 2000.0,
}
SIMULATED: Final = (*_OF_MODELS, *_OF_PROFILES, *_OF_ALL)
"""Flags that mean nothing to a server."""


def add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("load").add_argument
    add("--num-requests", type=int, default=2000, help="of each load or part of a trace [2000]")
    add("--flip-every", type=int, default=400, help="requests between flips of flipping [400]")
    add("--max-len", type=int, help="longer requests are cut")
    add("--length-scale", type=float, default=1.0, help="factor of all lengths [1]")
    add("--slo-ttft-ms", type=float, help="target [--slo-factor times a request alone]")
    add("--slo-tpot-ms", type=float, help="target [--slo-factor times a request alone]")
    add("--slo-factor", type=float, help=f"of simulated targets that are not given [{TIGHT}]")
    add("--slo-target", type=float, default=0.9, help="share that should meet both [0.9]")
    add("--seed", type=int, default=0, help="of what is drawn; of a trace, which part [0]")


def load_names() -> str:
    return f"{', '.join(_KNOWN)}, or a trace (.csv, .jsonl)"


def add_platform(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("simulated device").add_argument
    known = ", ".join(hardware.shipped())
    add("--hardware", help=f"{known}, or a file; modelled [{_OF_MODELS['hardware']}]")
    add(
        "--sharing",
        choices=("normalised", "conserving"),
        help="what becomes of modelled shares that do not fit: two bounds [conserving]",
    )
    add("--profile", type=Path, help="a latency profile, instead of --hardware")
    add("--kv-tokens", type=int, help="with --profile: size of the pool")
    add("--block-size", type=int, help="with --profile: tokens per page [16]")
    add("--hop-ms", type=float, help="with --profile: from a reply to the next step [1]")
    add("--host-ms", type=float, help="of a CPU that other processes take for each token [0]")
    add("--noise", type=float, help="standard deviation of log step times [0.03]")


def add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("engines").add_argument
    default = ", ".join(f"{p} {_text(LADDERS['predictive'].of(p))}" for p in PHASES)
    text = f"shares of both phases [what suits the policy; predictive: {default}]"
    add("--share-ladder", type=_shares, help=text)
    add("--prefill-share-ladder", type=_shares, help="the same for prefill alone")
    add("--decode-share-ladder", type=_shares, help="the same for decode alone")
    add("--chunk-tokens", type=int, help="of semi-PD's prefill and of chunked steps [1024]")
    add("--whole-tokens", type=int, help="of prefill steps without chunks [8192]")
    add("--max-num-seqs", type=int, help="requests that run at once [512]")
    text = "spf: a second of waiting counts as this many tokens less to compute [2000]"
    add("--ageing-tokens-per-s", type=float, help=text)


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """Of a simulation, with defaults. Raises ConfigError for a flag that would do nothing."""
    if args.profile is None:
        defaults = _OF_MODELS
        refuse(args, _OF_PROFILES, "only with --profile")
    else:
        defaults = _OF_PROFILES
        refuse(args, _OF_MODELS, "only without --profile")
        require(args.kv_tokens is not None, "kv_tokens", None, "a number of tokens, with --profile")
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**(vars(args) | _OF_ALL | _OF_ENGINES | defaults | given))


def refuse(args: argparse.Namespace, names: Iterable[str], allowed: str) -> None:
    """Raises ConfigError if one of these was given."""
    for name in names:
        value = getattr(args, name)
        require(value is None, "--" + name.replace("_", "-"), value, allowed)


def workload_of(args: argparse.Namespace, name: str, seed: int) -> Workload:
    """The load of this name. `seed` is that of what is drawn, and the number of the part of a
    trace, of so many requests each."""
    for number in ("num_requests", "flip_every"):
        require(getattr(args, number) > 0, number, getattr(args, number), "at least 1")
    if name in _KNOWN:
        max_len = args.max_len or _SYNTHETIC_MAX_LEN
        load = workloads.drawn(name, _lengths(args, name), max_len=max_len, seed=seed)
    else:
        path = Path(name)
        require(path.is_file(), "workload", name, load_names())
        rows, _ = traces.clip(_part(path, args.num_requests, seed), args.max_len or _TRACE_MAX_LEN)
        load = Workload(path.stem, tuple(rows))
    scaled = traces.scale(list(load.rows), time_scale=1.0, length_scale=args.length_scale)
    block_len = traces.hash_block_len(args.length_scale)
    return replace(load, rows=tuple(scaled), hash_block_len=block_len)


def _part(path: Path, num_requests: int, number: int) -> list[TraceRow]:
    all_rows = traces.read_trace(path)
    rows = all_rows[number * num_requests :][:num_requests]
    has_some = f"parts of {num_requests} requests, of {len(all_rows)} in {path}, from 0 on"
    require(bool(rows), "seed", number, has_some)
    return [replace(row, arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows]


def _lengths(args: argparse.Namespace, name: str) -> Sequence[workloads.Lengths]:
    num = args.num_requests
    if name == FLIPPING:
        return workloads.flipping(num, args.flip_every)
    return [workloads.SYNTHETIC[name]] * num


def setup_of(args: argparse.Namespace, workload: Workload) -> Setup:
    """Of `completed` flags. Targets that are not given follow from the load."""
    ageing = args.ageing_tokens_per_s
    require(0 < ageing < math.inf, "--ageing-tokens-per-s", ageing, "a positive number")
    device = _platform(args)
    target = multiple_of_alone(device.machine, workload, args.slo_factor)
    if args.slo_ttft_ms is not None:
        target = replace(target, ttft_ms=args.slo_ttft_ms)
    if args.slo_tpot_ms is not None:
        target = replace(target, tpot_ms=args.slo_tpot_ms)
    return Setup(
        platform=device,
        targets=SloTargets(target, attainment=args.slo_target),
        ladders=ladders_of(args),
        chunk_tokens=args.chunk_tokens,
        whole_tokens=args.whole_tokens,
        max_rows=args.max_num_seqs,
        ageing_tokens_per_s=ageing,
        noise=args.noise,
        seed=args.seed,
    )


def ladders_of(args: argparse.Namespace) -> Ladders | None:
    """As the engine takes its flags of these names; None if none is given."""
    prefill = args.prefill_share_ladder or args.share_ladder
    decode = args.decode_share_ladder or args.share_ladder
    return Ladders(prefill or (1.0,), decode or (1.0,)) if prefill or decode else None


def _platform(args: argparse.Namespace) -> Platform:
    host_s = (args.host_ms or 0.0) / 1e3
    if args.profile is None:
        device = platform.modelled(hardware.read(args.hardware), args.sharing)
        return replace(device, host_s=host_s)
    return platform.profiled(
        profile.from_json(args.profile.read_bytes()),
        kv_tokens=args.kv_tokens,
        page_size=args.block_size,
        hop_s=args.hop_ms / 1e3,
        host_s=host_s,
    )


def _shares(text: str) -> Ladder:
    return tuple(float(share) for share in text.split(","))


def _text(shares: Ladder) -> str:
    return ",".join(map(str, shares))
