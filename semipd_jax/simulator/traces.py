"""Traces of real services: arrival times and lengths, no text.

* CSV with TIMESTAMP, ContextTokens, GeneratedTokens: Azure LLM inference trace 2023
  (github.com/Azure/AzurePublicDataset, CC-BY-4.0).
* JSON lines with timestamp (ms), input_length, output_length and, optionally, hash_ids, one for
  each 512 tokens of the prompt: Mooncake (github.com/kvcache-ai/Mooncake, FAST25-release). Requests
  with the same leading hashes share that prefix.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Final

HASH_BLOCK_TOKENS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One request of a trace. `arrival_s` counts from the trace's first row."""

    arrival_s: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Clipping:
    """What shortening to a model's length did to a trace."""

    max_len: int
    num_requests: int
    num_tokens: int


def read_trace(path: Path, num_requests: int | None = None) -> list[TraceRow]:
    """The first `num_requests` rows; the format follows from the suffix, .csv or .jsonl."""
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path} is no known trace; allowed suffixes: {', '.join(readers)}")
    with path.open(newline="") as lines:
        rows = list(islice(reader(lines), num_requests))
    if not rows:
        raise ValueError(f"{path} has no requests")
    start = rows[0].arrival_s
    return [replace(row, arrival_s=row.arrival_s - start) for row in rows]


def scale(rows: list[TraceRow], *, time_scale: float, length_scale: float) -> list[TraceRow]:
    """Arrival times times `time_scale`; lengths times `length_scale`, at least one token."""

    def length(tokens: int) -> int:
        return max(1, round(tokens * length_scale))

    return [
        replace(
            row,
            arrival_s=row.arrival_s * time_scale,
            input_len=length(row.input_len),
            output_len=length(row.output_len),
        )
        for row in rows
    ]


def clip(rows: list[TraceRow], max_len: int) -> tuple[list[TraceRow], Clipping]:
    """Shortens requests to `max_len` tokens in all: outputs to half of it, then prompts."""
    if max_len < 2:
        raise ValueError(f"max_len is {max_len}; allowed: at least 2")
    clipped: list[TraceRow] = []
    for row in rows:
        output_len = min(row.output_len, max_len // 2)
        input_len = min(row.input_len, max_len - output_len)
        clipped.append(replace(row, input_len=input_len, output_len=output_len))
    lost = [
        before.input_len + before.output_len - after.input_len - after.output_len
        for before, after in zip(rows, clipped, strict=True)
    ]
    return clipped, Clipping(max_len, sum(tokens > 0 for tokens in lost), sum(lost))


def hash_block_len(length_scale: float) -> int:
    """Prompt tokens for each hash of a scaled trace: enough to cover the scaled prompt."""
    return ceil(HASH_BLOCK_TOKENS * length_scale)


def _read_csv(lines: Iterable[str]) -> Iterator[TraceRow]:
    for row in csv.DictReader(lines):
        yield TraceRow(
            arrival_s=_seconds(row["TIMESTAMP"]),
            input_len=int(row["ContextTokens"]),
            output_len=int(row["GeneratedTokens"]),
        )


def _seconds(timestamp: str) -> float:
    """Seconds since the epoch; `timestamp` has up to seven fractional digits."""
    whole, _, fraction = timestamp.partition(".")
    seconds = datetime.fromisoformat(whole + "+00:00").timestamp()
    return seconds + float(f"0.{fraction or 0}")


def _read_jsonl(lines: Iterable[str]) -> Iterator[TraceRow]:
    for line in filter(str.strip, lines):
        row = json.loads(line)
        yield TraceRow(
            arrival_s=row["timestamp"] / 1e3,
            input_len=row["input_length"],
            output_len=row["output_length"],
            hash_ids=tuple(row.get("hash_ids", ())),
        )
