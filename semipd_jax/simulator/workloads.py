"""Requests to simulate: arrivals and lengths, from a trace or drawn from distributions.

Lengths are log-normal around published means, cut to the model's length. The means of ShareGPT and
LongBench are those of DistServe (arXiv 2401.09670, figure 7), whose data semi-PD's evaluation of
Llama models is based on; the spread is an assumption.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from typing import Final

import numpy as np

from semipd_jax.config import require
from semipd_jax.simulator.arrivals import poisson
from semipd_jax.simulator.traces import HASH_BLOCK_TOKENS, TraceRow, clip


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths of prompts and outputs.

    Attributes:
      spread: standard deviations of the logarithms.
    """

    input_mean: float
    output_mean: float
    input_spread: float = 1.0
    output_spread: float = 0.8

    def draw(self, num: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        inputs = _log_normal(self.input_mean, self.input_spread, num, rng)
        outputs = _log_normal(self.output_mean, self.output_spread, num, rng)
        return list(zip(inputs, outputs, strict=True))


SHAREGPT: Final = Lengths(755.5, 200.3)
LONGBENCH: Final = Lengths(1738.3, 90.7)
SYNTHETIC: Final[Mapping[str, Lengths]] = {"sharegpt": SHAREGPT, "longbench": LONGBENCH}


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of arrival; rates are changed by stretching time.

    Attributes:
      hash_block_len: prompt tokens of each hash of a row.
      num_segments: parts between which the distribution of lengths changes.
      rate: requests per second as they are.
    """

    name: str
    rows: tuple[TraceRow, ...]
    hash_block_len: int = HASH_BLOCK_TOKENS
    num_segments: int = 1

    @property
    def rate(self) -> float:
        """Raises ConfigError if there is none, as all arrive at once."""
        times = [row.arrival_s for row in self.rows]
        require(len(set(times)) > 1, "load", self.name, "requests at two times or more")
        return (len(times) - 1) / (times[-1] - times[0])

    def at(self, rate: float) -> "Workload":
        factor = self.rate / rate
        rows = (replace(row, arrival_s=row.arrival_s * factor) for row in self.rows)
        return replace(self, rows=tuple(rows))


def flipping(num_requests: int, every: int) -> list[Lengths]:
    """ShareGPT-like lengths for so many requests, then LongBench-like ones, and back."""
    return [(SHAREGPT, LONGBENCH)[i // every % 2] for i in range(num_requests)]


def drawn(name: str, lengths: Sequence[Lengths], *, max_len: int, seed: int) -> Workload:
    """A Poisson load of 1 request per second, one for each of these."""
    arrivals = poisson(len(lengths), rate=1.0, burstiness=1.0, seed=seed)
    rng = np.random.default_rng((seed, 1))
    values = {kind: kind.draw(len(lengths), rng) for kind in dict.fromkeys(lengths)}
    rows = [
        TraceRow(arrival_s=at, input_len=values[kind][i][0], output_len=values[kind][i][1])
        for i, (at, kind) in enumerate(zip(arrivals, lengths, strict=True))
    ]
    clipped, _ = clip(rows, max_len)
    num_flips = sum(before != after for before, after in pairwise(lengths))
    return Workload(name, tuple(clipped), num_segments=1 + num_flips)


class Prompts:
    """Token ids for prompts: equal exactly where the trace says that prefixes are.

    Blocks are slices of one list, so that a prompt costs no more than its references.
    """

    def __init__(self, workload: Workload) -> None:
        rows = workload.rows
        longest = max(row.input_len for row in rows)
        blocks = max((max(row.hash_ids, default=0) for row in rows), default=0) + 1
        self._block_len = workload.hash_block_len
        self._first_own = blocks
        self._ids = list(range(blocks + len(rows) + max(longest, self._block_len)))

    def of(self, number: int, row: TraceRow) -> tuple[int, ...]:
        """Of the request with this position in the load."""
        ids: list[int] = []
        for hash_id in row.hash_ids:
            ids += self._ids[hash_id : hash_id + self._block_len]
        own = self._first_own + number
        ids += self._ids[own : own + max(0, row.input_len - len(ids))]
        return tuple(ids[: row.input_len])


def _log_normal(mean: float, spread: float, num: int, rng: np.random.Generator) -> list[int]:
    values = np.exp(log(mean) - spread**2 / 2 + spread * rng.standard_normal(num))
    return np.maximum(1, values.round()).astype(int).tolist()
