"""Timing of GPU work with the host's clock, without its overheads.

A contender is a program of many calls, one depending on the other, that the host starts again and
again without waiting; the device is then never idle. The time of a call is the slope between a
short and a long row of starts: what starting, waiting and the clock cost drops out.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Final

_FEW: Final = 2
_WARM_UPS: Final = 3
_TARGET_S: Final = 0.03
"""Time of the longer row of starts, at least: the clock and the host's jitter are far below."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to time.

    Attributes:
      run: starts the program so many times and returns when the last has ended.
      num_calls: calls of the op in the program.
    """

    run: Callable[[int], None]
    num_calls: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median, lowest and highest of all rounds."""

    median_s: float
    min_s: float
    max_s: float


def time_in_turns(
    contenders: Mapping[str, Contender],
    *,
    num_rounds: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times all contenders in each round, so that a drift of clocks or heat meets all alike."""

    def elapsed(contender: Contender, num_starts: int) -> float:
        start_s = clock()
        contender.run(num_starts)
        return clock() - start_s

    many = {}
    for name, contender in contenders.items():
        contender.run(_WARM_UPS)
        one_s = elapsed(contender, _FEW) / _FEW
        many[name] = _FEW + max(4, ceil(_TARGET_S / one_s))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_rounds):
        for name, contender in contenders.items():
            few_s, many_s = elapsed(contender, _FEW), elapsed(contender, many[name])
            num_calls = (many[name] - _FEW) * contender.num_calls
            samples[name].append((many_s - few_s) / num_calls)
    return {name: Timing(median(s), min(s), max(s)) for name, s in samples.items()}
