"""Semi-PD against one worker for both phases, on live servers: streams run while long prompts come.

    python -m benchmarks.modes --model DIR --json FILE

Systems take turns, seed after seed, each on a fresh server and with the same requests: chats, and
every few of them a long prompt. A turn measures one request of either kind alone, then latencies at
`--rate`, then goodput: the highest rate at which enough requests meet both targets. A system is a
name and a server's flags, as in `--system "mixed: --mode chunked --max-num-batched-tokens 64"`.
The first one is compared with the others. Flags after `--` are of all servers.
"""

import argparse
import asyncio
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks import common
from benchmarks.goodput.live import outcome_of
from benchmarks.goodput.search import find
from benchmarks.load import LoadRun, run_load
from benchmarks.metrics import OK, RequestRecord, tpot_s, ttft_s
from benchmarks.semipd import running_server, sender
from benchmarks.workload import PlannedRequest, replayed
from semipd_jax.config import require
from semipd_jax.errors import ConfigError
from semipd_jax.simulator.arrivals import poisson
from semipd_jax.simulator.traces import TraceRow
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner.slo import SloTarget, SloTargets
from semipd_server.client import AsyncClient

_SYSTEMS: Final = (
    "semi-pd: --prefill-share 0.5 --decode-share 0.5 --share-ladder 1.0",
    "colocated: --mode colocated",
    "chunked 512: --mode chunked --max-num-batched-tokens 512",
    "chunked 128: --mode chunked --max-num-batched-tokens 128",
)
"""A phase alone has all cores, both together have half of them each."""

_MOST_RUNS: Final = 1000  # with prompts of their own, for each seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """`chat` and `long` are (prompt, output) tokens; every `period`-th request is a long one."""

    chat: tuple[int, int]
    long: tuple[int, int]
    period: int

    def workload(self, num_requests: int, seed: int) -> Workload:
        arrivals = poisson(num_requests, rate=1.0, burstiness=1.0, seed=seed)
        kinds = [self.long if i % self.period == self.period - 1 else self.chat
                 for i in range(num_requests)]  # fmt: skip
        rows = [
            TraceRow(arrival_s=at, input_len=kind[0], output_len=kind[1])
            for at, kind in zip(arrivals, kinds, strict=True)
        ]
        return Workload("chats and long prompts", tuple(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One system with one seed.

    Attributes:
      alone_ttft_ms, alone_tpot_ms: of a long prompt and of a chat that have the server to
        themselves.
      itl_p99_ms: of those gaps of the chats' tokens in which a long prompt was on its way to its
        first token.
      ttft_p90_ms: of all requests; like `itl_p99_ms` at the given rate.
      goodput: requests per second.
      attainment: rate → share of requests that met both targets.
    """

    system: str
    seed: int
    alone_ttft_ms: float
    alone_tpot_ms: float
    itl_p99_ms: float
    ttft_p90_ms: float
    goodput: float
    attainment: dict[float, float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    mix = Mix(
        chat=(args.chat_input, args.chat_output),
        long=(args.long_input, args.long_output),
        period=args.period,
    )
    turns: list[Turn] = []
    try:
        require(args.period >= 2, "period", args.period, "at least 2")
        require(args.num_requests > args.period, "num_requests", args.num_requests, "above period")
        for seed in range(args.seed, args.seed + args.repeat):
            for system in args.system or _SYSTEMS:
                turn = _turn(args, system, mix, seed)
                turns.append(turn)
                print(f"{turn.system}, seed {seed}: {turn.goodput:.2f} requests/s", flush=True)
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    _print(turns)
    if args.json:
        runs = {"turns": [asdict(turn) for turn in turns], "ratios": ratios(turns)}
        common.write_json(args.json, common.header(vars(args)) | runs)


def _turn(args: argparse.Namespace, system: str, mix: Mix, seed: int) -> Turn:
    name, _, flags = system.partition(":")
    flags = [*shlex.split(flags), *args.server]
    load = mix.workload(args.num_requests, seed)
    target = SloTarget(args.slo_ttft_ms, args.slo_tpot_ms)
    with running_server(args.model, flags, timeout_s=args.timeout) as (address, model):
        longest = max(map(sum, (mix.chat, mix.long)))
        most = model.max_model_len
        require(longest <= most, "longest request", longest, f"at most {most}, the model's limit")
        prompt_seeds = count(seed * _MOST_RUNS)

        def run(load: Workload) -> LoadRun:
            planned = replayed(
                list(load.rows),
                hash_block_len=load.hash_block_len,
                vocab_size=model.vocab_size,
                seed=next(prompt_seeds),
            )
            return asyncio.run(_send(planned, address, args.timeout))

        for kind in (mix.chat, mix.long):  # a warm-up
            run(_single(kind))
        chat, long = (run(_single(kind)).records[0] for kind in (mix.chat, mix.long))
        records = run(load.at(args.rate)).records
        found = find(
            lambda rate: outcome_of(run(load.at(rate)), {}),
            SloTargets(target, attainment=args.slo_target),
            seed,
            start=args.rate,
            least=args.least_rate,
            precision=args.precision,
        )
    if failed := [r.status for r in records if r.status != OK]:
        raise RuntimeError(f"{name}: {len(failed)} of {len(records)} requests failed: {failed[0]}")
    chats = [r for r in records if r.num_prompt_tokens == mix.chat[0]]
    longs = [r for r in records if r.num_prompt_tokens == mix.long[0]]
    return Turn(
        system=name,
        seed=seed,
        alone_ttft_ms=percentile_ms([ttft_s(long)], 50),
        alone_tpot_ms=percentile_ms([tpot_s(chat)], 50),
        itl_p99_ms=percentile_ms(gaps_beside(chats, longs), 99),
        ttft_p90_ms=percentile_ms([ttft_s(r) for r in records], 90),
        goodput=found.rate,
        attainment={rate: tried.attainment(target) for rate, tried in found.trials.items()},
    )


def _single(kind: tuple[int, int]) -> Workload:
    return Workload("alone", (TraceRow(arrival_s=0.0, input_len=kind[0], output_len=kind[1]),))


async def _send(planned: list[PlannedRequest], address: str, timeout_s: float) -> LoadRun:
    async with AsyncClient(address) as client:
        return await run_load(planned, sender(client), request_timeout_s=timeout_s)


def gaps_beside(chats: Sequence[RequestRecord], longs: Sequence[RequestRecord]) -> list[float]:
    """Seconds between tokens of chats, where some of them passed before the first token of a long
    prompt that had been sent."""
    waits = [(r.sent_s, r.arrivals[0].at_s) for r in longs]
    return [
        b.at_s - a.at_s
        for chat in chats
        for a, b in pairwise(chat.arrivals)
        if any(a.at_s < end and start < b.at_s for start, end in waits)
    ]


def percentile_ms(seconds: Sequence[float | None], percent: float) -> float:
    """Of the values that exist."""
    return float(np.percentile([1e3 * s for s in seconds if s is not None], percent))


def ratios(turns: Sequence[Turn]) -> dict[str, list[float]]:
    """By how much the first system is better, one value for each seed."""
    by_system: dict[str, list[Turn]] = {}
    for turn in turns:
        by_system.setdefault(turn.system, []).append(turn)
    (name, ours), *others = by_system.items()
    found: dict[str, list[float]] = {}
    for other, theirs in others:
        pairs = list(zip(theirs, ours, strict=True))
        found[f"p99 ITL, {other} / {name}"] = [a.itl_p99_ms / b.itl_p99_ms for a, b in pairs]
        found[f"p90 TTFT, {other} / {name}"] = [a.ttft_p90_ms / b.ttft_p90_ms for a, b in pairs]
    best = [max(t.goodput for t in one) for one in zip(*(o for _, o in others), strict=True)]
    found[f"goodput, {name} / best other"] = [
        turn.goodput / other if other else math.inf for turn, other in zip(ours, best, strict=True)
    ]
    return found


def _print(turns: Sequence[Turn]) -> None:
    """Median, lowest and highest over the seeds."""
    columns = {
        "p99 ITL ms": "itl_p99_ms",
        "p90 TTFT ms": "ttft_p90_ms",
        "goodput /s": "goodput",
        "long prompt alone: TTFT ms": "alone_ttft_ms",
        "chat alone: TPOT ms": "alone_tpot_ms",
    }
    rows: list[list[str]] = []
    for system in dict.fromkeys(turn.system for turn in turns):
        own = [turn for turn in turns if turn.system == system]
        rows.append([system, *(_spread([getattr(t, c) for t in own]) for c in columns.values())])
    print()
    common.print_table(("", *columns), rows)
    print()
    found = [(name, *common.spread(values)) for name, values in ratios(turns).items()]
    common.print_table(("", "min", "median", "max"), found)


def _spread(values: Sequence[float]) -> str:
    low, middle, high = common.spread(values)
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of the model to serve")
    add("server", nargs="*", help="after --: flags of every server")
    add("--system", action="append", help=f"name: flags; may be repeated [{'; '.join(_SYSTEMS)}]")
    add("--repeat", type=int, default=3, help="turns of each system, with a seed each [3]")
    add("--seed", type=int, default=0, help="of the first arrivals and prompts [0]")
    add("--timeout", type=float, default=600.0, help="seconds for any one wait [600]")
    add("--json", type=Path, help="write the result to this file")
    load = parser.add_argument_group("load").add_argument
    load("--rate", type=float, default=1.0, help="requests/s of the latencies [1]")
    load("--num-requests", type=int, default=48, help="requests of a run [48]")
    load("--chat-input", type=int, default=64, help="prompt tokens of a chat [64]")
    load("--chat-output", type=int, default=96, help="output tokens of a chat [96]")
    load("--long-input", type=int, default=1500, help="prompt tokens of a long prompt [1500]")
    load("--long-output", type=int, default=16, help="output tokens after a long prompt [16]")
    load("--period", type=int, default=6, help="every so many requests one is long [6]")
    goal = parser.add_argument_group("goodput").add_argument
    goal("--slo-ttft-ms", type=float, default=5000.0, help="promised to all requests [5000]")
    goal("--slo-tpot-ms", type=float, default=100.0, help="promised to all requests [100]")
    goal("--slo-target", type=float, default=0.9, help="share of requests that meet both [0.9]")
    goal("--least-rate", type=float, default=0.1, help="below it, goodput counts as 0 [0.1]")
    goal("--precision", type=float, default=0.1, help="of the rate, relative [0.1]")
    return parser


if __name__ == "__main__":
    main()
