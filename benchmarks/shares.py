"""`python -m benchmarks.shares`: what it costs to change a phase's share while requests run.

Each phase has a core of its own, so that the phases do not show in each other's times.

On the ladder: the decode phase moves between two rungs with the same core (0.5 and a hair less),
so that nothing but the move itself can show. After each move, and as often after a moment without
one, the longest of a stream's next gaps between tokens is taken; the two alternate in random order.
The time that a move adds is the difference of the two distributions.

Beside the ladder: the gaps while a worker starts in the background, takes over and is let go,
against those of quiet times before and after.

Both run in rounds; the interval behind a number is that of 1,000 resamplings (5 % to 95 %).
"""

import argparse
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import common
from benchmarks.switching import Streams, moves_and_none, start_beside
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine

_RUNGS: Final = (0.499, 0.5)
_BESIDE: Final = 0.498
_QUIET_S: Final = 10.0
_RESAMPLINGS: Final = 1000
TARGET_ADDED_MS: Final = 2.0
TARGET_RATIO: Final = 1.5


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


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, the interval that resampling gives it, and what it was in each round."""

    value: float
    low: float
    high: float
    by_round: tuple[float, ...]
    target: float

    @property
    def is_met(self) -> bool:
        return self.value <= self.target

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_met": self.is_met}

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        interval = f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.value:.2f} ({interval}), target {self.target}: {verdict}"


type Rounds = Sequence[tuple[Sequence[float], Sequence[float]]]
"""Of each round: with the change, and without."""


def estimate(
    rounds: Rounds, statistic: Callable[[np.ndarray, np.ndarray], float], target: float
) -> Estimate:
    """`statistic` (with, without) of all rounds together."""
    rng = np.random.default_rng(0)
    changed, unchanged = (
        np.concatenate([np.asarray(pair[i]) for pair in rounds]) for i in range(2)
    )
    resampled = [
        statistic(rng.choice(changed, changed.size), rng.choice(unchanged, unchanged.size))
        for _ in range(_RESAMPLINGS)
    ]
    low, high = np.percentile(resampled, (5, 95))
    by_round = tuple(statistic(np.asarray(a), np.asarray(b)) for a, b in rounds)
    return Estimate(statistic(changed, unchanged), float(low), float(high), by_round, target)


def added_p99_ms(changed: np.ndarray, unchanged: np.ndarray) -> float:
    return float(1000 * (np.percentile(changed, 99) - np.percentile(unchanged, 99)))


def p99_ratio(changed: np.ndarray, unchanged: np.ndarray) -> float:
    return float(np.percentile(changed, 99) / np.percentile(unchanged, 99))


async def measure(args: argparse.Namespace) -> tuple[Rounds, Rounds]:
    """The rounds on the ladder, and those beside it."""
    options = {
        "max_num_seqs": 8,
        "prefill_share_ladder": (_RUNGS[1],),
        "decode_share_ladder": _RUNGS,
    }
    async with AsyncEngine(args.model, **options) as engine:
        streams = Streams(engine, args.streams)
        await streams.tokens(50)
        per_round = -(-args.moves // args.rounds)
        on = [
            await moves_and_none(engine, streams, _RUNGS, per_round, seed)
            for seed in range(args.rounds)
        ]
        beside = [
            await start_beside(engine, streams, _BESIDE, _RUNGS[1], _QUIET_S)
            for _ in range(args.rounds)
        ]
        await streams.stop()
    return on, beside


def summarise(on: Rounds, beside: Rounds) -> dict[str, Any]:
    """Prints what was found and returns it for the JSON file."""
    found: dict[str, Any] = {}
    for name, rounds, kinds, label, result in (
        (
            "on the ladder",
            on,
            ("move", "no move"),
            "added_p99_ms",
            estimate(on, added_p99_ms, TARGET_ADDED_MS),
        ),
        (
            "beside the ladder",
            beside,
            ("while a worker starts", "undisturbed"),
            "p99_ratio",
            estimate(beside, p99_ratio, TARGET_RATIO),
        ),
    ):
        gaps = {
            kind: Gaps.of([gap for pair in rounds for gap in pair[i]])
            for i, kind in enumerate(kinds)
        }
        print(f"\n{name}: gaps between tokens, ms")
        rows = [(kind, g.count, g.p50, g.p99, g.max) for kind, g in gaps.items()]
        common.print_table(("", "count", "p50", "p99", "max"), rows)
        print(f"{label}: {result}")
        found[name] = {kind: asdict(g) for kind, g in gaps.items()} | {label: result.as_json()}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shares",
        description="Measure what a change of compute shares costs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(MODEL_DIR), help="model directory")
    parser.add_argument("--streams", type=int, default=4, help="requests that decode")
    parser.add_argument("--moves", type=int, default=500, help="moves between rungs, in all")
    parser.add_argument("--rounds", type=int, default=4, help="one worker beside the ladder each")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args(argv)
    result = common.header(vars(args))
    result |= summarise(*asyncio.run(measure(args)))
    if args.json:
        common.write_json(args.json, result)


if __name__ == "__main__":
    main()
