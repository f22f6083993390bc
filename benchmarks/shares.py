"""`python -m benchmarks.shares`: what it costs to change a phase's share while requests run.

Each phase has a core of its own, so that the phases do not show in each other's times.

On the ladder: the decode phase moves between two rungs with the same core (0.5 and a hair less),
so that nothing but the move itself can show. After each move, and as often after a moment without
one, the longest of a stream's next gaps between tokens is taken; the two alternate in random order,
and the difference of their distributions is the cost of a move.

Beside the ladder: the gaps while a worker starts in the background and takes over, against the gaps
before it was asked for and after it was let go.
"""

import argparse
import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import common
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine
from semipd_jax.request import Delta

_RUNGS: Final = (0.499, 0.5)
_BESIDE: Final = 0.498
_GAPS: Final = 4
"""A move shows within the steps that were in flight when it was asked for and the next one."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Milliseconds."""

    count: int
    p50: float
    p99: float
    max: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Gaps":
        p50, p99, most = np.percentile(1000 * np.asarray(seconds), (50, 99, 100))
        return Gaps(len(seconds), float(p50), float(p99), float(most))


class Streams:
    """Requests that decode without end, and the moment of every token of the first one."""

    def __init__(self, engine: AsyncEngine, num_streams: int) -> None:
        self.times: list[float] = []
        self._engine = engine
        self._tasks = [asyncio.ensure_future(self._run(i)) for i in range(num_streams)]
        self._tasks.append(asyncio.ensure_future(self._prefill()))

    async def _run(self, index: int) -> None:
        while True:
            prompt = [5 + index, 6, 7]
            async for event in self._engine.generate(prompt, max_tokens=1500, ignore_eos=True):
                if index == 0 and isinstance(event, Delta):
                    self.times.append(time.monotonic())

    async def _prefill(self) -> None:
        """Keeps both phases at work: one that is alone would not leave its largest share."""
        for i in range(10**9):
            await self._engine.complete([i % 1000, 9, 8], max_tokens=1)

    async def tokens(self, count: int) -> None:
        wanted = len(self.times) + count
        while len(self.times) < wanted:
            await asyncio.sleep(0.001)

    async def longest_gap(self) -> float:
        """Of the next few gaps."""
        first = len(self.times) - 1
        await self.tokens(_GAPS)
        return float(np.diff(self.times[first : first + _GAPS + 1]).max())

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def on_the_ladder(engine: AsyncEngine, streams: Streams, moves: int) -> dict[str, Gaps]:
    rng = random.Random(0)
    found: dict[str, list[float]] = {"move": [], "no move": []}
    rung = 0
    plan = ["move", "no move"] * moves
    rng.shuffle(plan)
    for kind in plan:
        await streams.tokens(rng.randrange(2, 6))
        if kind == "move":
            rung = 1 - rung
        await engine.set_partition(decode=_RUNGS[rung])
        found[kind].append(await streams.longest_gap())
    return {kind: Gaps.of(gaps) for kind, gaps in found.items()}


async def beside_the_ladder(engine: AsyncEngine, streams: Streams, repeat: int) -> dict[str, Gaps]:
    quiet: list[float] = []
    changing: list[float] = []
    for _ in range(repeat):
        quiet += await _gaps_until(streams, _lasting(10.0))
        await engine.set_partition(decode=_BESIDE)
        changing += await _gaps_until(streams, lambda: _is_warm(engine, _BESIDE))
        await engine.set_partition(decode=_RUNGS[1])
        quiet += await _gaps_until(streams, _lasting(10.0))
    return {"undisturbed": Gaps.of(quiet), "while a worker starts": Gaps.of(changing)}


def _lasting(seconds: float) -> Any:
    end_s = time.monotonic() + seconds

    async def is_over() -> bool:
        return time.monotonic() > end_s

    return is_over


async def _is_warm(engine: AsyncEngine, share: float) -> bool:
    return share in (await engine.partition()).decode.warm


async def _gaps_until(streams: Streams, is_over: Any) -> list[float]:
    first = len(streams.times)
    while not await is_over():
        await asyncio.sleep(0.1)
    return np.diff(streams.times[first:]).tolist()


async def measure(args: argparse.Namespace) -> dict[str, dict[str, Gaps]]:
    options = {
        "max_num_seqs": 8,
        "prefill_share_ladder": (_RUNGS[1],),
        "decode_share_ladder": _RUNGS,
    }
    async with AsyncEngine(args.model, **options) as engine:
        streams = Streams(engine, args.streams)
        await streams.tokens(50)
        result = {
            "on the ladder": await on_the_ladder(engine, streams, args.moves),
            "beside the ladder": await beside_the_ladder(engine, streams, args.repeat),
        }
        await streams.stop()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shares",
        description="Measure what a change of compute shares costs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(MODEL_DIR), help="model directory")
    parser.add_argument("--streams", type=int, default=4, help="requests that decode")
    parser.add_argument("--moves", type=int, default=500, help="moves between rungs")
    parser.add_argument("--repeat", type=int, default=3, help="moves beside the ladder")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args(argv)
    result = common.header(vars(args))
    for name, gaps in asyncio.run(measure(args)).items():
        print(f"\n{name}: gaps between tokens, ms")
        rows = [(kind, g.count, g.p50, g.p99, g.max) for kind, g in gaps.items()]
        common.print_table(("", "count", "p50", "p99", "max"), rows)
        result[name] = {kind: asdict(g) for kind, g in gaps.items()}
    if args.json:
        common.write_json(args.json, result)


if __name__ == "__main__":
    main()
