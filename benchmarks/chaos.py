"""`python -m benchmarks.chaos`: workers are killed at random while requests run.

A fixed set of requests runs once undisturbed, then again and again while every few seconds a random
worker gets SIGKILL. No request may be lost or get other tokens, all pages must be free after each
round, and no process may grow from round to round or be left behind. Exits with 1 otherwise.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import common
from benchmarks.processes import engine_processes
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine

_LADDER: Final = (0.5,)
NUM_WORKERS: Final = 4


def workload(num_requests: int) -> list[tuple[list[int], dict[str, float]]]:
    """Prompts of 1 to 600 tokens; half of the requests are greedy, half seeded."""
    rng = random.Random(0)
    return [
        (
            [rng.randrange(100, 4000) for _ in range(rng.randrange(1, 600))],
            {"temperature": 0.0} if i % 2 else {"temperature": 0.9, "seed": i},
        )
        for i in range(num_requests)
    ]


async def run_all(engine: AsyncEngine, num_requests: int) -> list[tuple[int, ...]]:
    async def one(prompt: list[int], sampling: dict[str, float]) -> tuple[int, ...]:
        result = await engine.complete(prompt, max_tokens=150, ignore_eos=True, **sampling)
        return result.token_ids

    return await asyncio.gather(*(one(*request) for request in workload(num_requests)))


async def kill_workers(every_s: float, counts: dict[str, int]) -> None:
    rng = random.Random(1)
    while True:
        await asyncio.sleep(every_s)
        workers = {n: p for n, p in engine_processes().items() if "worker" in n}
        if workers:
            name = rng.choice(sorted(workers))
            workers[name].kill()
            counts[name] = counts.get(name, 0) + 1


async def all_workers_ready(engine: AsyncEngine) -> None:
    async with asyncio.timeout(120):
        while True:
            partition = await engine.partition()
            if len(partition.prefill.warm) + len(partition.decode.warm) == NUM_WORKERS:
                return
            await asyncio.sleep(0.1)


def private_mib() -> dict[str, float]:
    """Of the processes that are never replaced."""
    kept = ("memory owner", "coordinator")
    processes = engine_processes()
    return {name: processes[name].memory_full_info().uss / 2**20 for name in kept}


async def chaos(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What happened, and what should not have. `args.free_bytes`, if it is not None, tells how much
    memory of the device is free."""
    wrong: list[str] = []
    kills: dict[str, int] = {}
    rounds = 0
    free_bytes = args.free_bytes or (lambda: 0)
    options = {"max_num_seqs": 8, "share_ladder": _LADDER, "enable_prefix_caching": False}
    async with AsyncEngine(args.model, device=args.device, **options) as engine:
        undisturbed = await run_all(engine, args.requests)
        before = private_mib()
        free_before = free_bytes()
        killing = asyncio.ensure_future(kill_workers(args.every, kills))
        end_s = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end_s:
            answers = await run_all(engine, args.requests)
            rounds += 1
            different = sum(a != b for a, b in zip(answers, undisturbed, strict=True))
            if different:
                wrong.append(f"round {rounds}: {different} requests have other tokens")
            stats = await engine.stats()
            if stats.num_free_pages != stats.num_pages:
                wrong.append(f"round {rounds}: {stats.num_free_pages} of {stats.num_pages} free")
            print(f"round {rounds}: {sum(kills.values())} kills", file=sys.stderr, flush=True)
        killing.cancel()
        await all_workers_ready(engine)
        after = private_mib()
        lost_bytes = free_before - free_bytes()
    wrong += [
        f"{name} grew from {before[name]:.0f} to {after[name]:.0f} MiB"
        for name in before
        if after[name] > before[name] + args.growth_mib
    ]
    wrong += [f"left behind: {name}" for name in engine_processes()]
    what = {
        "rounds": rounds,
        "requests": rounds * args.requests,
        "kills": kills,
        "private_mib_before": before,
        "private_mib_after": after,
        "lost_device_bytes": lost_bytes,
        "wrong": wrong,
    }
    return what, wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description="Kill workers at random under load.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(MODEL_DIR), help="model directory")
    parser.add_argument("--device", default="auto", help="where workers run")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two kills")
    parser.add_argument("--requests", type=int, default=24, help="requests of a round")
    parser.add_argument("--growth-mib", type=float, default=16.0, help="allowed growth")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args(argv, argparse.Namespace(free_bytes=None))
    result = common.header(vars(args))
    what, wrong = asyncio.run(chaos(args))
    for name, value in what.items():
        print(f"{name}: {value}")
    if args.json:
        common.write_json(args.json, result | what)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
