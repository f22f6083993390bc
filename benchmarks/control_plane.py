"""Everything around the model: coordinator, front end and client, with workers that only answer.

    python -m benchmarks.control_plane

1. The coordinator alone, in this process: time for each decode step.
2. Real processes, one client process with many streams over gRPC, once with workers that answer at
   once and once with workers that pace the load. At once, tokens outrun the front end, which merges
   what has not been sent: that is the most the chain can carry. Paced, nearly every token should
   travel as a message of its own, and on time.

The memory owner is the real one, with a tiny random model.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import httpx2

from benchmarks import checkpoint, common, workload
from benchmarks.coordinator_step import step_times_s
from benchmarks.fake_engine import fake_engine
from benchmarks.fake_worker import STEP_S
from benchmarks.load import run_load
from benchmarks.metrics import OK, Distribution, RequestRecord, distribution_ms, itl_s
from benchmarks.processes import cpu_seconds
from benchmarks.semipd import sender
from semipd_jax.launch.launcher import Launcher
from semipd_jax.messages import FromCoordinator, GetStats, Stats, ToCoordinator
from semipd_jax.simulator import arrivals
from semipd_jax.transport.channels import CLIENTS, Link
from semipd_server.client import AsyncClient, Client

_STEP_ROWS: Final = (64, 256)
_STEPS: Final = 1000
_CONTEXT_LEN: Final = 1024
_INPUT_LEN: Final = 32
_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Run:
    """One repetition through real processes.

    Attributes:
      tokens_per_message: above 1 where tokens were merged on their way.
      coordinator_step_ms: mean time from a worker's reply to the last message it caused.
      cpu_us_per_token: by process; unlike the rates, hardly disturbed by other programs.
    """

    tokens_per_s: float
    tokens_per_message: float
    decode_steps_per_s: float
    itl_p99_ms: float
    coordinator_step_ms: float
    cpu_us_per_token: dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    result = common.header(vars(args))
    result["coordinator_step_ms"] = _measure_coordinator()
    for name, step_s in (("at once", 0.0), ("paced", args.streams / args.rate)):
        runs = _measure_processes(args, step_s)
        print(f"\nworkers answer {name}: {args.streams} streams, {args.repeat} repetitions")
        _print_runs(runs)
        result[name] = [asdict(run) for run in runs]
    if args.json:
        common.write_json(args.json, result)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control_plane",
        description="Measure everything around the model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--streams", type=int, default=64, help="requests at the same time")
    parser.add_argument("--output-len", type=int, default=512, help="tokens of each stream")
    parser.add_argument("--rate", type=float, default=12_000, help="tokens/s of paced workers")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser.parse_args(argv)


def _measure_coordinator() -> dict[int, dict[str, Any]]:
    found: dict[int, Distribution] = {}
    for rows in _STEP_ROWS:
        times = step_times_s(num_rows=rows, context_len=_CONTEXT_LEN, num_steps=_STEPS)
        distribution = distribution_ms(times)
        assert distribution is not None
        found[rows] = distribution
    print(f"coordinator alone: ms for each of {_STEPS} decode steps, context {_CONTEXT_LEN}")
    rows = [(str(rows), d.mean, d.p50, d.p90, d.p99) for rows, d in found.items()]
    common.print_table(("rows", "mean", "p50", "p90", "p99"), rows)
    return {rows: asdict(d) for rows, d in found.items()}


def _measure_processes(args: argparse.Namespace, step_s: float) -> list[Run]:
    os.environ[STEP_S] = str(step_s)  # workers inherit it
    try:
        with fake_engine(args.streams) as launcher:
            work = repeat(launcher, args.repeat, streams=args.streams, output_len=args.output_len)
            return asyncio.run(work)
    finally:
        del os.environ[STEP_S]


async def repeat(
    launcher: Launcher, times: int, *, streams: int, output_len: int, api_key: str | None = None
) -> list[Run]:
    """Runs of `streams` requests with `output_len` tokens each, after one to warm up, while metrics
    are read."""
    assert launcher.address is not None
    await asyncio.to_thread(_wait_until_ready, launcher.address, api_key)
    reading = asyncio.create_task(_read_metrics(launcher.http_address, api_key))
    try:
        async with AsyncClient(launcher.address, api_key=api_key, retries=0) as client:
            await _run(client, launcher.run_dir, streams, output_len)
            return [await _run(client, launcher.run_dir, streams, output_len) for _ in range(times)]
    finally:
        reading.cancel()


def _wait_until_ready(address: str, api_key: str | None) -> None:
    with Client(address, api_key=api_key, retries=4) as client:
        client.model_info()


async def _read_metrics(url: str | None, api_key: str | None) -> None:
    """Once a second, if there are any."""
    if url is None:
        return
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers) as client:
        while True:
            (await client.get("/metrics")).raise_for_status()
            await asyncio.sleep(1.0)


async def _run(client: AsyncClient, run_dir: str, streams: int, output_len: int) -> Run:
    planned = workload.fixed(
        arrivals.poisson(streams, rate=float("inf"), burstiness=1.0, seed=0),
        input_len=_INPUT_LEN,
        output_len=output_len,
        vocab_size=checkpoint.TINY["vocab_size"],
        seed=0,
    )
    stats, cpu, start_s = _stats(run_dir), cpu_seconds("client"), time.perf_counter()
    done = await run_load(planned, sender(client), request_timeout_s=_TIMEOUT_S)
    elapsed_s = time.perf_counter() - start_s
    stats_after, cpu_after = _stats(run_dir), cpu_seconds("client")
    records = done.records
    _check(records)
    num_tokens = sum(r.num_output_tokens for r in records)
    itl = distribution_ms(gap for r in records for gap in itl_s(r))
    return Run(
        tokens_per_s=num_tokens / elapsed_s,
        tokens_per_message=num_tokens / sum(len(r.arrivals) for r in records),
        decode_steps_per_s=(stats_after.num_decode_steps - stats.num_decode_steps) / elapsed_s,
        # Of streams whose tokens all came merged into one message there are no gaps.
        itl_p99_ms=itl.p99 if itl is not None else float("nan"),
        coordinator_step_ms=1e3
        * (_busy_s(stats_after) - _busy_s(stats))
        / (_num_steps(stats_after) - _num_steps(stats)),
        cpu_us_per_token={
            name: 1e6 * (cpu_after[name] - cpu[name]) / num_tokens
            for name in cpu
            if name in cpu_after
        },
    )


def _stats(run_dir: str) -> Stats:
    identity = f"benchmark-{time.monotonic_ns()}"  # the last one may not be forgotten yet
    link = Link[FromCoordinator, ToCoordinator](run_dir, CLIENTS, identity, FromCoordinator)
    link.send(GetStats(1))
    stats = link.receive(_TIMEOUT_S)
    link.close()
    if not isinstance(stats, Stats):
        raise RuntimeError("the coordinator does not answer")
    return stats


def _num_steps(stats: Stats) -> int:
    return stats.num_prefill_steps + stats.num_decode_steps


def _busy_s(stats: Stats) -> float:
    return stats.mean_plan_s * _num_steps(stats)


def _check(records: Sequence[RequestRecord]) -> None:
    failures = [record.status for record in records if record.status != OK]
    if failures:
        raise RuntimeError(f"{len(failures)} requests failed: {failures[0]}")


def _print_runs(runs: Sequence[Run]) -> None:
    columns: dict[str, list[float]] = {
        "tokens/s": [run.tokens_per_s for run in runs],
        "tokens/message": [run.tokens_per_message for run in runs],
        "decode steps/s": [run.decode_steps_per_s for run in runs],
        "ITL p99 ms": [run.itl_p99_ms for run in runs],
        "coordinator ms/step": [run.coordinator_step_ms for run in runs],
    }
    for name in runs[0].cpu_us_per_token:
        columns[f"CPU µs/token, {name}"] = [run.cpu_us_per_token[name] for run in runs]
    rows = [(name, *common.spread(values)) for name, values in columns.items()]
    common.print_table(("", "min", "median", "max"), rows)


if __name__ == "__main__":
    main()
