"""Load on a server over gRPC: latencies, rates and SLO attainment as clients see them.

    python -m benchmarks.serve --model DIR --rate 4 --num-requests 200
    python -m benchmarks.serve --target HOST:PORT --trace conv.csv --time-scale 10
    python -m benchmarks.serve --model DIR --rate inf --num-requests 16 --baseline transformers
    python -m benchmarks.serve --model DIR --rate 4 -- --max-num-seqs 64

Without `--target` it starts a server on a free port and stops it at the end; flags after `--` are
the server's. Prompts are random token ids; outputs are greedy and forced to their planned length.
"""

import argparse
import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks import common, compare, workload
from benchmarks.load import LoadRun, Send, run_load
from benchmarks.metrics import Slo, latencies, summarise
from benchmarks.report import print_runs, trace_note
from benchmarks.semipd import running_server, sender, wait_until_ready
from semipd_jax.demo import MODEL_DIR
from semipd_jax.simulator import arrivals, traces
from semipd_server.client import AsyncClient
from semipd_server.pb import inference_pb2 as pb

_WARM_UP_SEED: Final = 1_000_000


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if args.cores:
        os.sched_setaffinity(0, range(args.cores))
    with ExitStack() as stack:
        if args.target:
            target, model = args.target, wait_until_ready(args.target, timeout_s=args.timeout)
        else:
            server = running_server(args.model, args.server, timeout_s=args.timeout)
            target, model = stack.enter_context(server)
        result = asyncio.run(_measure(args, target, model))
    if args.json:
        common.write_json(args.json, result)


async def _measure(
    args: argparse.Namespace, target: str, model: pb.GetModelInfoResponse
) -> dict[str, Any]:
    result = common.header(vars(args)) | {"model": model.name, "dtype": model.dtype}
    plan = _plan(args, model)
    async with AsyncClient(target, retries=0) as client:
        send = sender(client)
        if args.baseline is None:
            return result | await _load(args, plan, send)
        budgets, turns = await compare.take_turns(
            plan, send, args.model, repeat=args.repeat, seed=args.seed, timeout_s=args.timeout
        )
    print_runs([turn.ours for turn in turns], Slo())
    compare.print_comparison(budgets, turns)
    return result | compare.as_json(budgets, turns)


async def _load(args: argparse.Namespace, plan: compare.Plan, send: Send) -> dict[str, Any]:
    warm_up = [*plan(_WARM_UP_SEED)][: args.num_warmups]
    await run_load(warm_up, send, request_timeout_s=args.timeout)
    runs: list[LoadRun] = []
    for i in range(args.repeat):
        planned = plan(args.seed + i)
        runs.append(await run_load(planned, send, request_timeout_s=args.timeout))
    slo = Slo(_seconds(args.slo_ttft_ms), _seconds(args.slo_tpot_ms))
    print_runs(runs, slo)
    return {
        "runs": [asdict(summarise(r.records, slo)) | {"generator": asdict(r.health)} for r in runs],
        "latencies_of_all_runs": asdict(latencies(record for r in runs for record in r.records)),
    }


def _plan(args: argparse.Namespace, model: pb.GetModelInfoResponse) -> compare.Plan:
    """What is sent, as the arguments say, for a model; says what was cut off a trace."""
    if args.trace is None:
        return lambda seed: workload.fixed(
            arrivals.poisson(
                args.num_requests, rate=args.rate, burstiness=args.burstiness, seed=seed
            ),
            input_len=args.input_len,
            output_len=args.output_len,
            vocab_size=model.vocab_size,
            seed=seed,
        )
    rows = traces.read_trace(args.trace, args.num_requests)
    rows = traces.scale(rows, time_scale=args.time_scale, length_scale=args.length_scale)
    rows, clipping = traces.clip(
        rows, min(args.max_len or model.max_model_len, model.max_model_len)
    )
    print(trace_note(args.trace, args.time_scale, args.length_scale, rows, clipping))
    return lambda seed: workload.replayed(
        rows,
        hash_block_len=traces.hash_block_len(args.length_scale),
        vocab_size=model.vocab_size,
        seed=seed,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description="Measure a server under load.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", help="address of a running server")
    parser.add_argument("--model", default=str(MODEL_DIR), help="directory of the model to serve")
    parser.add_argument("server", nargs="*", help="after --: flags of the server that is started")
    parser.add_argument("--num-requests", type=int, default=32, help="requests of a run")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and prompts")
    parser.add_argument("--repeat", type=int, default=1, help="runs, with one seed after another")
    parser.add_argument("--num-warmups", type=int, default=4, help="requests before the first run")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for any one wait")
    parser.add_argument("--cores", type=int, help="use the first so many cores, for everything")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument(
        "--baseline", choices=["transformers"], help="run it too, in turns; needs --rate inf"
    )
    fixed = parser.add_argument_group("fixed lengths")
    fixed.add_argument("--rate", type=float, default=4.0, help="requests per second, or inf")
    fixed.add_argument(
        "--burstiness", type=float, default=1.0, help="1: Poisson; below 1: burstier"
    )
    fixed.add_argument("--input-len", type=int, default=128, help="prompt tokens")
    fixed.add_argument("--output-len", type=int, default=64, help="output tokens")
    trace = parser.add_argument_group("trace replay")
    trace.add_argument("--trace", type=Path, help="Azure CSV or Mooncake JSONL")
    trace.add_argument("--time-scale", type=float, default=1.0, help="factor of arrival times")
    trace.add_argument("--length-scale", type=float, default=1.0, help="factor of lengths")
    trace.add_argument("--max-len", type=int, help="clip to so many tokens [the model's limit]")
    slo = parser.add_argument_group("service level objective")
    slo.add_argument("--slo-ttft-ms", type=float, help="target of the time to the first token")
    slo.add_argument("--slo-tpot-ms", type=float, help="target of the time per further token")
    args = parser.parse_args(argv)
    if args.baseline and (args.trace or args.rate != float("inf")):
        parser.error("--baseline compares throughput: it needs --rate inf and no --trace")
    return args


if __name__ == "__main__":
    main()
