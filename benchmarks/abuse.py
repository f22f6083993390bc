"""`python -m benchmarks.abuse`: polite clients while others misbehave.

A few polite streams run alone, then beside each kind of abuse: 1,000 streams at once, storms of
cancels, clients that never read or whose host vanishes, connections that say nothing, messages and
bodies that are too long or no messages at all. The polite ones' gaps between tokens (p99) may at
most double, and the front end may not grow. The real processes, with workers that pace the load.
Exits with 1 otherwise.

Who misbehaves is another process on this machine, but stands for another machine: so it only gets
the CPU time that nobody else wants (SCHED_IDLE). How long the gaps are when it takes its full share
of the server's own cores is measured, too, and told, without a bound.
"""

import argparse
import asyncio
import contextlib
import functools
import os
import random
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import httpx2

from benchmarks import common
from benchmarks.fake_engine import fake_engine
from benchmarks.fake_worker import STEP_S
from benchmarks.half_open import vanish
from benchmarks.metrics import distribution_ms
from benchmarks.processes import engine_processes, idle_stats, stats_when
from benchmarks.semipd import wait_until_ready
from semipd_jax.launch.launcher import Launcher
from semipd_jax.messages import Stats
from semipd_jax.request import Delta
from semipd_server.client import AsyncClient
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.settings import Settings

_POLITE: Final = 4
_POLITE_TOKENS: Final = 200
_STEP_TIME_S: Final = 0.02
_ROWS: Final = 1100
_STREAMS: Final = 1000
_LONG: Final = 2000  # tokens: such a stream outlasts its measurement
_SOCKETS: Final = 200
_START_S: Final = 3.0
_MOST_RATIO: Final = 2.0
_NOTICEABLE_MS: Final = 5.0  # below this, a difference is the machine's noise
_GROWTH_MIB: Final = 200.0


@dataclass(frozen=True, slots=True)
class Result:
    """Of one kind of abuse; "none" is the comparison.

    Attributes:
      itl_p99_ms: gaps of the polite.
      ttft_ms: the longest of the polite.
      shared_itl_p99_ms: gaps of the polite while who misbehaves takes the server's CPU time, too.
    """

    kind: str
    itl_p99_ms: float
    ttft_ms: float
    shared_itl_p99_ms: float
    front_end_mib: float


class Abuse:
    """Each method is one act, repeated for as long as the polite clients run."""

    def __init__(self, target: str, url: str) -> None:
        self.target = target
        self.url = url
        self._rng = random.Random(0)

    async def none(self) -> None:
        await asyncio.sleep(0.1)

    async def thousand_streams(self) -> None:
        async with self._channel() as stub:
            calls = [stub.Generate(_request(max_tokens=_LONG)) for _ in range(_STREAMS)]
            await asyncio.gather(*(_read(call) for call in calls), return_exceptions=True)

    async def cancel_storm(self) -> None:
        async with self._channel() as stub:
            calls = [stub.Generate(_request(max_tokens=200)) for _ in range(50)]
            await asyncio.sleep(self._rng.uniform(0, 0.1))
            for call in calls:
                call.cancel()

    async def never_reads(self) -> None:
        await self._hold(_long_stream(), 5)

    async def vanishes(self) -> None:
        await self._hold(_long_stream(), 5, then=vanish)

    async def says_nothing(self) -> None:
        await self._hold(b"", _SOCKETS)

    async def half_a_request(self) -> None:
        await self._hold(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n", _SOCKETS)

    async def too_long(self) -> None:
        async with httpx2.AsyncClient(base_url=self.url, timeout=30) as client:
            with contextlib.suppress(httpx2.HTTPError):
                await client.post(
                    "/v1/completions",
                    content=b'{"prompt": "' + b"a" * (8 << 20),
                    headers={"content-type": "application/json"},
                )

    async def no_messages(self) -> None:
        async with grpc.aio.insecure_channel(self.target) as channel:
            method = channel.unary_stream("/semipd.v1.InferenceService/Generate")
            for _ in range(50):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in method(self._rng.randbytes(1000)):
                        pass

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.target) as channel:
            yield pb_grpc.InferenceServiceStub(channel)

    async def _hold(
        self, sent: bytes, count: int, *, then: Callable[[socket.socket], None] = lambda _: None
    ) -> None:
        """Connections on which this is sent, `then` something is done, and nothing is read."""
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as held:
            for _ in range(count):
                client = held.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                with contextlib.suppress(OSError):
                    await loop.sock_connect(client, (host, int(port)))
                    await loop.sock_sendall(client, sent)
                then(client)
            await asyncio.sleep(2.0)


def _long_stream() -> bytes:
    body = b'{"prompt": [5], "n": 16, "max_tokens": 200, "logprobs": 20, "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    return (head + "content-type: application/json\r\n\r\n").encode() + body


def _request(**sampling: Any) -> pb.GenerateRequest:
    message = pb.SamplingParams(ignore_eos=True, **sampling)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling=message)


async def _read(call: Any) -> None:
    async for _ in call:
        pass


async def _polite(target: str) -> tuple[float, list[float]]:
    """Time to the first token of one well-behaved stream, and gaps between its messages, in
    seconds."""
    start_s, ttft_s = time.perf_counter(), float("nan")
    gaps: list[float] = []
    async with AsyncClient(target, retries=0) as client:
        events = client.generate([5, 6], max_tokens=_POLITE_TOKENS, ignore_eos=True)
        async with aclosing(events):
            last_s = None
            async for event in events:
                now_s = time.perf_counter()
                if isinstance(event, Delta):
                    if last_s is None:
                        ttft_s = now_s - start_s
                    else:
                        gaps.append(now_s - last_s)
                    last_s = now_s
    return ttft_s, gaps


async def _misbehave(kind: str, target: str, url: str) -> None:
    """Acts until its process is ended."""
    act: Callable[[], Awaitable[None]] = getattr(Abuse(target, url), kind)
    while True:
        await act()


async def _beside(
    kind: str, launcher: Launcher, *, in_background: bool
) -> tuple[float, list[float]]:
    """The longest TTFT and all gaps of the polite clients, in seconds, while another process
    misbehaves."""
    target, url = launcher.address, launcher.http_address
    assert target is not None
    assert url is not None
    command = (sys.executable, "-m", "benchmarks.abuse", "--act", kind, target, url)
    other = await asyncio.create_subprocess_exec(*command)
    if in_background:
        os.sched_setscheduler(other.pid, os.SCHED_IDLE, os.sched_param(0))
    try:
        await asyncio.sleep(_START_S)
        if kind == "thousand_streams":
            wanted = functools.partial(_all_run, _STREAMS)
            await asyncio.to_thread(stats_when, launcher.run_dir, wanted)
        streams = await asyncio.gather(*(_polite(target) for _ in range(_POLITE)))
        if other.returncode is not None:
            raise RuntimeError(f"{kind} ended with status {other.returncode}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            other.kill()
        await other.wait()
    return max(ttft_s for ttft_s, _ in streams), [gap for _, gaps in streams for gap in gaps]


def _all_run(count: int, stats: Stats) -> bool:
    return stats.num_running >= count


def _result(kind: str, launcher: Launcher) -> Result:
    ttft_s, gaps_s = asyncio.run(_beside(kind, launcher, in_background=True))
    idle_stats(launcher.run_dir)
    _, shared_s = asyncio.run(_beside(kind, launcher, in_background=False))
    idle_stats(launcher.run_dir)
    gaps, shared = distribution_ms(gaps_s), distribution_ms(shared_s)
    assert gaps is not None
    assert shared is not None
    mib = engine_processes()["front end"].memory_full_info().uss / 2**20
    return Result(kind, gaps.p99, 1e3 * ttft_s, shared.p99, mib)


def _measure(launcher: Launcher, kinds: Sequence[str]) -> tuple[list[Result], list[str]]:
    assert launcher.address is not None
    wait_until_ready(launcher.address, timeout_s=60.0)
    results: list[Result] = []
    for kind in ("none", *kinds):
        results.append(_result(kind, launcher))
        print(f"{results[-1]}", file=sys.stderr, flush=True)
    alone, *others = results
    most_ms = max(_MOST_RATIO * alone.itl_p99_ms, alone.itl_p99_ms + _NOTICEABLE_MS)
    wrong = [f"{r.kind}: p99 is {r.itl_p99_ms:.1f} ms" for r in others if r.itl_p99_ms > most_ms]
    most_mib = alone.front_end_mib + _GROWTH_MIB
    wrong += [f"{r.kind}: {r.front_end_mib:.0f} MiB" for r in others if r.front_end_mib > most_mib]
    stats = idle_stats(launcher.run_dir)
    if stats.num_free_pages != stats.num_pages:
        wrong.append(f"{stats.num_free_pages} of {stats.num_pages} pages are free")
    return results, wrong


_KINDS: Final = (
    *("thousand_streams", "cancel_storm", "never_reads", "vanishes", "says_nothing"),
    *("half_a_request", "too_long", "no_messages"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.abuse", description="Polite clients while others misbehave."
    )
    parser.add_argument("kinds", nargs="*", help=f"which of {', '.join(_KINDS)} [all]")
    parser.add_argument("--act", nargs=3, help=argparse.SUPPRESS)  # the other process
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args(argv)
    if args.act:
        asyncio.run(_misbehave(*args.act))
    if unknown := set(args.kinds) - set(_KINDS):
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(_KINDS)}")
    os.environ[STEP_S] = str(_STEP_TIME_S)  # workers inherit it
    with fake_engine(_ROWS, Settings(port=0, http_port=0)) as launcher:
        results, wrong = _measure(launcher, args.kinds or _KINDS)
    columns = ("abuse", "ITL p99 ms", "TTFT ms", "ITL p99 ms, shared CPU", "front end MiB")
    common.print_table(columns, [astuple(r) for r in results])
    for problem in wrong:
        print(f"WRONG: {problem}")
    if args.json:
        found = {"results": [asdict(r) for r in results], "wrong": wrong}
        common.write_json(args.json, common.header(vars(args)) | found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
