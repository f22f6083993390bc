"""`python -m benchmarks.soak`: everything that users do, for a long time, while workers are killed.

Over gRPC and HTTP at once: requests that run to their end and must get the tokens that they got
undisturbed; requests that are cancelled, aborted, left by their client or given a deadline too
short; requests that are refused. Every few seconds a random worker gets SIGKILL. No request may
fail that did not ask for it, all pages must be free at the end, no process may grow or be left.
Exits with 1 otherwise.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Final

import httpx2

from benchmarks import common
from benchmarks.chaos import kill_workers
from benchmarks.processes import engine_processes, idle_stats
from benchmarks.semipd import wait_until_ready
from semipd_jax import options
from semipd_jax.demo import MODEL_DIR
from semipd_jax.errors import InvalidRequestError, RequestNotFoundError
from semipd_jax.launch.launcher import FrontEnd, Launcher
from semipd_jax.request import Delta
from semipd_server.client import AsyncClient
from semipd_server.settings import Settings

_PROMPTS: Final = 12
_OUTPUT_LEN: Final = 60
_HTTP_TIMEOUT_S: Final = 120.0
_SAMPLE_S: Final = 5.0
_KEPT: Final = ("memory owner", "coordinator", "front end")


@dataclass(slots=True)
class Seen:
    """What happened.

    Attributes:
      counts: requests by what their user did.
      wrong: what should not have happened.
      mib: private memory of the processes that are never replaced, over time.
    """

    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    mib: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


class Users:
    """Each method is one request of one kind of user."""

    def __init__(self, client: AsyncClient, http: httpx2.AsyncClient, seen: Seen) -> None:
        self._client = client
        self._http = http
        self._seen = seen
        self._rng = random.Random(0)
        rng = random.Random(1)
        self._prompts = [
            [rng.randrange(100, 4000) for _ in range(rng.randrange(1, 400))]
            for _ in range(_PROMPTS)
        ]
        self._answers: list[list[int]] = []

    async def remember(self) -> None:
        """What every prompt is answered with, undisturbed."""
        self._answers = [await self._tokens(prompt) for prompt in self._prompts]

    async def finish(self) -> None:
        number = self._rng.randrange(_PROMPTS)
        if await self._tokens(self._prompts[number]) != self._answers[number]:
            self._seen.wrong.append(f"prompt {number} has other tokens")

    async def finish_http(self) -> None:
        reply = await self._http.post("/v1/completions", json=self._body(stream=False))
        if reply.status_code != 200:
            self._seen.wrong.append(f"HTTP {reply.status_code}: {reply.text[:200]}")

    async def cancel(self) -> None:
        events = self._client.generate(self._prompt(), max_tokens=200, ignore_eos=True)
        async with aclosing(events):
            for _ in range(self._rng.randrange(1, 10)):
                await anext(events)

    async def abort(self) -> None:
        request_id = f"soak-{self._rng.getrandbits(64):x}"
        events = self._client.generate(
            self._prompt(), request_id=request_id, max_tokens=200, ignore_eos=True
        )
        async with aclosing(events):
            await anext(events)
            with suppress(RequestNotFoundError):
                await self._client.abort(request_id)
            async for _ in events:
                pass

    async def be_late(self) -> None:
        with suppress(TimeoutError):
            timeout_s = self._rng.uniform(0.001, 0.3)
            await self._client.complete(self._prompt(), max_tokens=200, timeout_s=timeout_s)

    async def leave(self) -> None:
        stream = self._http.stream("POST", "/v1/completions", json=self._body(stream=True))
        async with stream as reply:
            async for _ in reply.aiter_lines():
                break

    async def be_refused(self) -> None:
        with suppress(InvalidRequestError):
            await self._client.complete([10**6], max_tokens=1)
            self._seen.wrong.append("a token id out of range is served")

    async def _tokens(self, prompt: list[int]) -> list[int]:
        events = self._client.generate(
            prompt, max_tokens=_OUTPUT_LEN, temperature=0.0, ignore_eos=True
        )
        async with aclosing(events):
            return [t async for e in events if isinstance(e, Delta) for t in e.token_ids]

    def _prompt(self) -> list[int]:
        return self._rng.choice(self._prompts)

    def _body(self, *, stream: bool) -> dict[str, object]:
        return {"prompt": self._prompt(), "max_tokens": _OUTPUT_LEN, "stream": stream}


async def soak(launcher: Launcher, args: argparse.Namespace) -> Seen:
    assert launcher.address is not None
    assert launcher.http_address is not None
    seen, kills = Seen(), dict[str, int]()
    async with (
        AsyncClient(launcher.address, retries=0) as client,
        httpx2.AsyncClient(base_url=launcher.http_address, timeout=_HTTP_TIMEOUT_S) as http,
    ):
        users = Users(client, http, seen)
        await users.remember()
        end_s = time.monotonic() + 60 * args.minutes
        kinds = (
            *(users.finish, users.finish, users.finish_http, users.cancel, users.abort),
            *(users.be_late, users.leave, users.be_refused),
        )
        disturbing = [
            asyncio.ensure_future(kill_workers(args.every, kills)),
            asyncio.ensure_future(_watch(seen)),
        ]
        await asyncio.gather(
            *(_repeat(kinds, end_s, seen, random.Random(i)) for i in range(args.users))
        )
        for task in disturbing:
            task.cancel()
        ends = await asyncio.gather(*disturbing, return_exceptions=True)
        seen.wrong += [f"{e!r}" for e in ends if not isinstance(e, asyncio.CancelledError)]
    seen.counts |= Counter({f"killed {name}": count for name, count in kills.items()})
    return seen


async def _repeat(
    kinds: Sequence[Callable[[], Awaitable[None]]], end_s: float, seen: Seen, rng: random.Random
) -> None:
    while time.monotonic() < end_s:
        use = rng.choice(kinds)
        try:
            await use()
        except Exception as error:
            seen.wrong.append(f"{use.__name__}: {type(error).__name__}: {error}")
            await asyncio.sleep(1.0)
        seen.counts[use.__name__] += 1


async def _watch(seen: Seen) -> None:
    while True:
        processes = await asyncio.to_thread(engine_processes)
        for name in _KEPT:
            uss = processes[name].memory_full_info().uss
            seen.mib.setdefault(name, []).append(uss / 2**20)
        await asyncio.sleep(_SAMPLE_S)


def growth_mib(samples: Sequence[float]) -> float:
    """From the second quarter of the time, when caches are filled, to the last."""
    quarter = max(len(samples) // 4, 1)
    return mean(samples[-quarter:]) - mean(samples[quarter : 2 * quarter] or samples)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    result = common.header(vars(args))
    config = options.build_config(args.model, max_num_seqs=8, share_ladder=(0.5,))
    extra = Settings(port=0, http_port=0).to_extra()
    launcher = Launcher(config, front_end=FrontEnd(module="semipd_server.main", extra=extra))
    launcher.start()
    try:
        assert launcher.address is not None
        wait_until_ready(launcher.address, timeout_s=60.0)
        seen = asyncio.run(soak(launcher, args))
        stats = idle_stats(launcher.run_dir)
    finally:
        launcher.stop()
    wrong = list(seen.wrong)
    if stats.num_free_pages != stats.num_pages:
        wrong.append(f"{stats.num_free_pages} of {stats.num_pages} pages are free")
    growth = {name: growth_mib(samples) for name, samples in seen.mib.items()}
    wrong += [
        f"{name} grew by {mib:.1f} MiB" for name, mib in growth.items() if mib > args.growth_mib
    ]
    wrong += [f"left behind: {name}" for name in engine_processes()]
    for name, count in sorted(seen.counts.items()):
        print(f"{count:8,}  {name}")
    print(f"growth in MiB: {growth}\nwrong: {len(wrong)}", *wrong[:20], sep="\n")
    if args.json:
        found = {"counts": seen.counts, "growth_mib": growth, "mib": seen.mib, "wrong": wrong}
        common.write_json(args.json, result | found)
    return 1 if wrong else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Mixed load with aborts, deadlines and killed workers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(MODEL_DIR), help="model directory")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long")
    parser.add_argument("--users", type=int, default=16, help="users at the same time")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two kills")
    parser.add_argument("--growth-mib", type=float, default=8.0, help="allowed growth")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
