"""`python -m semipd_jax.simulate`: policies and baselines on a virtual clock.

run       one rate: latencies and attainment of each system
goodput   the highest rate at which enough requests meet their targets
paper     goodput over several workloads, with the ratios of semi-PD's paper beside ours
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from semipd_jax.config import require
from semipd_jax.errors import ConfigError
from semipd_jax.simulator import comparison, hardware, platform, report, traces, workloads
from semipd_jax.simulator.goodput import goodput, run_at
from semipd_jax.simulator.systems import Setup, parse
from semipd_jax.simulator.targets import TIGHT, multiple_of_alone
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner import profile
from semipd_jax.tuner.policy import DEFAULT_LADDER, check_ladder
from semipd_jax.tuner.slo import SloTarget, SloTargets

_SYSTEMS: Final = ("colocated", "chunked", "static:1,1", "semi-pd", "predictive", "predictive+spf")
_FLIPPING: Final = "flipping"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        for name in args.systems:
            parse(name)
        result = args.command(args)
    except (ConfigError, ValueError, OSError) as error:
        print(f"semipd_jax.simulate: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


# ---------------------------------------------------------------- commands


def _run(args: argparse.Namespace) -> dict[str, Any]:
    workload = _workload(args, args.workload)
    setup = _setup(args, workload)
    rate = args.rate if args.rate is not None else workload.rate / args.time_scale
    head = report.header(setup.platform, workload, setup.targets) | {"rate_per_device": rate}
    rows = {
        name: report.summary(run_at(parse(name), setup, workload, rate), setup.targets)
        for name in args.systems
    }
    print(report.heading(head))
    print(f"{rate:.2f} requests/s and device\n")
    cells = [report.run_row(name, row) for name, row in rows.items()]
    print(report.table(report.RUN_COLUMNS, cells))
    return head | {"systems": rows}


def _goodput(args: argparse.Namespace) -> dict[str, Any]:
    workload = _workload(args, args.workload)
    setup = _setup(args, workload)
    head = report.header(setup.platform, workload, setup.targets)
    rows: dict[str, Any] = {}
    for name in args.systems:
        found = goodput(parse(name), setup, workload, start_rate=args.rate or workload.rate)
        rows[name] = report.summary(found.outcome, setup.targets) | {"goodput": found.rate}
        _progress(f"{name}: {found.rate:.2f}/s in {found.num_runs} runs")
    print(report.heading(head), end="\n\n")
    cells = [[*report.run_row(n, row), f"{row['goodput']:.2f}"] for n, row in rows.items()]
    print(report.table([*report.RUN_COLUMNS, "goodput/s"], cells))
    return head | {"systems": rows}


def _paper(args: argparse.Namespace) -> dict[str, Any]:
    names = [*workloads.SYNTHETIC, _FLIPPING, *args.trace]
    heads: list[dict[str, Any]] = []
    comparisons: list[comparison.Comparison] = []
    for name in names:
        workload = _workload(args, name)
        setup = _setup(args, workload)
        heads.append(report.header(setup.platform, workload, setup.targets))
        comparisons.append(
            comparison.compare(
                args.systems, setup, workload, start_rate=args.rate or 2.0, progress=_progress
            )
        )
    print("\n".join(map(report.heading, heads)), end="\n\n")
    print(comparison.goodput_table(comparisons), end="\n\n")
    print(comparison.ratio_table(comparisons), end="\n\n")
    for c in comparisons:
        print(f"{c.workload}: static pairs that beat {comparison.OURS} by over 2 %: ", end="")
        print(", ".join(c.better_statics) or "none")
    return {
        "paper_ratios": dict(comparison.PAPER_RATIOS),
        "workloads": [
            head
            | {
                "better_statics": list(c.better_statics),
                "goodput": {name: found.rate for name, found in c.goodputs.items()},
            }
            for head, c in zip(heads, comparisons, strict=True)
        ],
    }


# ---------------------------------------------------------------- what the flags describe


def _workload(args: argparse.Namespace, name: str) -> Workload:
    num, seed, longest = args.num_requests, args.seed, args.max_model_len
    if name in workloads.SYNTHETIC:
        return workloads.synthetic(name, num_requests=num, max_len=longest or 8192, seed=seed)
    if name == _FLIPPING:
        return workloads.flipping(
            num_requests=num, num_flips=args.num_flips, max_len=longest or 8192, seed=seed
        )
    path = Path(name)
    known = ", ".join([*workloads.SYNTHETIC, _FLIPPING])
    require(path.is_file(), "workload", name, f"{known}, or a trace (.csv, .jsonl)")
    rows = traces.read_trace(path, num)
    return workloads.traced(path.stem, rows, max_len=longest or 131072)


def _setup(args: argparse.Namespace, workload: Workload) -> Setup:
    on = _platform(args)
    check_ladder(args.ladder)
    default = multiple_of_alone(on.machine, workload, args.slo_factor)
    given = SloTarget(args.slo_ttft_ms, args.slo_tpot_ms)
    target = replace(
        default,
        ttft_ms=given.ttft_ms or default.ttft_ms,
        tpot_ms=given.tpot_ms or default.tpot_ms,
    )
    return Setup(
        platform=on,
        targets=SloTargets(target, attainment=args.slo_target),
        ladder=args.ladder,
        prefill_tokens=args.prefill_tokens,
        colocated_tokens=args.colocated_tokens,
        chunk_tokens=args.chunk_tokens,
        max_rows=args.max_num_seqs,
        noise=args.noise,
        seed=args.seed,
    )


def _platform(args: argparse.Namespace) -> platform.Platform:
    if args.profile is None:
        return platform.modelled(hardware.read(args.hardware), args.sharing)
    require(args.kv_tokens is not None, "kv_tokens", None, "a number of tokens, with --profile")
    return platform.profiled(
        profile.from_json(args.profile.read_bytes()),
        kv_tokens=args.kv_tokens,
        page_size=args.block_size,
        hop_s=args.hop_ms / 1e3,
    )


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m semipd_jax.simulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    for name, command, systems in (
        ("run", _run, _SYSTEMS),
        ("goodput", _goodput, _SYSTEMS),
        ("paper", _paper, comparison.SYSTEMS),
    ):
        sub = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(command=command)
        _add_load(sub, is_paper=name == "paper")
        _add_platform(sub)
        _add_engine(sub, systems)
        sub.add_argument("--json", type=Path, help="where results go, too")
    return parser


def _add_load(parser: argparse.ArgumentParser, *, is_paper: bool) -> None:
    add = parser.add_argument_group("load").add_argument
    if is_paper:
        add("--trace", action="append", default=[], help="a trace (.csv, .jsonl); may be repeated")
    else:
        known = ", ".join([*workloads.SYNTHETIC, _FLIPPING])
        add("--workload", default="sharegpt", help=f"{known}, or a trace (.csv, .jsonl)")
        add("--time-scale", type=float, default=1.0, help="stretches arrivals, if there is no rate")
    add("--rate", type=float, help="requests/s and device; where a search for goodput starts")
    add("--num-requests", type=int, default=2000, help="the first ones of a trace")
    add("--num-flips", type=int, default=5, help="of the flipping load")
    add("--max-model-len", type=int, help="longer requests are cut")
    add("--slo-ttft-ms", type=float, help="target [--slo-factor times a request alone]")
    add("--slo-tpot-ms", type=float, help="target [--slo-factor times a request alone]")
    add("--slo-factor", type=float, default=TIGHT, help="of targets that are not given")
    add("--slo-target", type=float, default=0.9, help="share of requests that should meet both")


def _add_platform(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("device").add_argument
    known = ", ".join(hardware.shipped())
    add("--hardware", default="h100-llama-3-8b", help=f"{known}, or a file; modelled")
    add(
        "--sharing",
        choices=("normalised", "conserving"),
        default="conserving",
        help="what becomes of modelled shares that do not fit: two bounds",
    )
    add("--profile", type=Path, help="a latency profile, instead of --hardware")
    add("--kv-tokens", type=int, help="with --profile: size of the pool")
    add("--block-size", type=int, default=16, help="with --profile: tokens per page")
    add("--hop-ms", type=float, default=1.0, help="with --profile: from a reply to the next step")


def _add_engine(parser: argparse.ArgumentParser, systems: Sequence[str]) -> None:
    add = parser.add_argument_group("engines").add_argument
    add("--systems", type=str.split, default=" ".join(systems), help="names, between spaces")
    add("--ladder", type=_ladder, default=",".join(map(str, DEFAULT_LADDER)), help="of shares")
    add("--prefill-tokens", type=int, default=2048, help="chunk budget of semi-PD's prefill")
    add("--colocated-tokens", type=int, default=8192, help="of prefill steps without chunking")
    add("--chunk-tokens", type=int, default=1024, help="of chunked steps")
    add("--max-num-seqs", type=int, default=512, help="requests that run at once")
    add("--noise", type=float, default=0.03, help="standard deviation of log step times")
    add("--seed", type=int, default=0, help="of lengths, arrivals and noise")


def _ladder(text: str) -> tuple[float, ...]:
    return tuple(float(share) for share in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
