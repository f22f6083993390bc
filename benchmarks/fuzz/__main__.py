"""Inputs of every kind against the real processes, with workers that only answer.

    python -m benchmarks.fuzz --inputs 100000

Half go to HTTP: the routes that take JSON, and one that is not there, with odd headers. Half go to
gRPC, with odd metadata: our contract, vLLM's, health checks (but no watches, which never end) and
reflection. Control, which is private, is not among them. Every answer must be a success or the
client's fault; afterwards the same processes must be there, no request may be left, all pages must
be free, and the front end may not have grown. Exits with 1 otherwise.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks import common
from benchmarks.fake_engine import fake_engine
from benchmarks.fuzz.inputs import BODIES
from benchmarks.fuzz.run import Outcome, fuzz
from benchmarks.processes import idle_stats
from benchmarks.semipd import wait_until_ready
from semipd_jax.launch.launcher import Launcher
from semipd_server.settings import Settings

_WARM_UP = 2_000
_TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    result = common.header(vars(args))
    with fake_engine(64, Settings(port=0, http_port=0)) as launcher:
        assert launcher.address is not None
        wait_until_ready(launcher.address, timeout_s=_TIMEOUT_S)
        _send(launcher, min(_WARM_UP, args.inputs), args.seed)
        before = _processes()
        started_s = time.monotonic()
        outcome = _send(launcher, args.inputs, args.seed + 1_000_000)
        elapsed_s = time.monotonic() - started_s
        wrong = [*outcome.wrong, *_after(launcher, before, args.growth_mib)]
        wrong += [
            f"nothing that was sent to {route} was taken"
            for route in BODIES
            if not outcome.answers[f"POST {route} 200"]
        ]
        growth = {name: _mib(p) - mib for name, (p, mib) in before.items() if p.is_running()}
    for answer, count in sorted(outcome.answers.items()):
        print(f"{count:8,}  {answer}")
    print(f"{outcome.answers.total():,} inputs in {elapsed_s:.0f} s; growth in MiB: {growth}")
    for problem in wrong:
        print(f"WRONG: {problem}")
    if args.json:
        found = {"answers": outcome.answers, "growth_mib": growth, "wrong": wrong}
        common.write_json(args.json, result | found | {"elapsed_s": elapsed_s})
    return 1 if wrong else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description="Send inputs of every kind to every public surface.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--growth-mib", type=float, default=64.0, help="allowed growth")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser.parse_args(argv)


def _send(launcher: Launcher, num_inputs: int, first_seed: int) -> Outcome:
    assert launcher.address is not None
    assert launcher.http_address is not None
    work = fuzz(
        launcher.address, launcher.http_address, num_inputs=num_inputs, first_seed=first_seed
    )
    return asyncio.run(work)


def _processes() -> dict[str, tuple[psutil.Process, float]]:
    children = psutil.Process().children()
    return {" ".join(p.cmdline()).strip(): (p, _mib(p)) for p in children}


def _mib(process: psutil.Process) -> float:
    return process.memory_full_info().uss / 2**20


def _after(
    launcher: Launcher, before: dict[str, tuple[psutil.Process, float]], growth_mib: float
) -> list[str]:
    wrong = [f"{name} is gone" for name, (p, _) in before.items() if not p.is_running()]
    wrong += [
        f"{name} grew from {mib:.0f} to {_mib(p):.0f} MiB"
        for name, (p, mib) in before.items()
        if p.is_running() and _mib(p) > mib + growth_mib
    ]
    stats = idle_stats(launcher.run_dir)
    if stats.num_running or stats.num_waiting:
        wrong.append(f"{stats.num_running} requests run and {stats.num_waiting} wait")
    if stats.num_free_pages != stats.num_pages:
        wrong.append(f"{stats.num_free_pages} of {stats.num_pages} pages are free")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
