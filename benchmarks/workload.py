"""What is sent: prompts of random token ids, and how many tokens each must generate.

The same seed gives the same workload. Prompts differ between seeds, so that a repetition does not
find its prompts in a prefix cache.
"""

from dataclasses import dataclass

import numpy as np

from semipd_jax.simulator.traces import TraceRow


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request. It generates exactly `output_len` tokens (end-of-sequence is ignored)."""

    arrival_s: float
    prompt_token_ids: tuple[int, ...]
    output_len: int


def fixed(
    arrivals_s: list[float], *, input_len: int, output_len: int, vocab_size: int, seed: int
) -> list[PlannedRequest]:
    """One request for each arrival, all of the same lengths."""
    prompts = np.random.default_rng(seed).integers(vocab_size, size=(len(arrivals_s), input_len))
    return [
        PlannedRequest(arrival_s=arrival_s, prompt_token_ids=tuple(prompt), output_len=output_len)
        for arrival_s, prompt in zip(arrivals_s, prompts.tolist(), strict=True)
    ]


def replayed(
    rows: list[TraceRow], *, hash_block_len: int, vocab_size: int, seed: int
) -> list[PlannedRequest]:
    """One request for each row. Equal hashes become equal blocks of `hash_block_len` tokens."""
    rng = np.random.default_rng(seed)
    return [
        PlannedRequest(
            arrival_s=row.arrival_s,
            prompt_token_ids=tuple(_prompt(row, rng, hash_block_len, vocab_size, seed)),
            output_len=row.output_len,
        )
        for row in rows
    ]


def _prompt(
    row: TraceRow, rng: np.random.Generator, block_len: int, vocab_size: int, seed: int
) -> list[int]:
    shared: list[int] = []
    for hash_id in row.hash_ids:
        block = np.random.default_rng((seed, hash_id)).integers(vocab_size, size=block_len)
        shared += block.tolist()
    own = rng.integers(vocab_size, size=max(0, row.input_len - len(shared)))
    return [*shared, *own.tolist()][: row.input_len]
