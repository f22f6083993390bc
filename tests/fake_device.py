"""A worker's arithmetic on plain Python memory: runs step messages the way the real one does.

Every token depends on all tokens before it, read back through the page table, so one wrong or
overwritten slot changes everything that follows.
"""

from pathlib import Path

import numpy as np

from semipd_jax.messages import ROW_SAMPLING, DecodeStep, PrefillStep, StepDone

VOCAB = 50


def next_token(tokens: list[int], seed: int) -> int:
    """The token that follows `tokens`."""
    value = seed
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCAB


class FakeDevice:
    """Its memory is its own, or two arrays in a directory that several processes share."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_rows: int,
        length: int,
        directory: Path | None = None,
    ) -> None:
        def memory(name: str, shape: tuple[int, int]) -> np.ndarray:
            if directory is None:
                return np.full(shape, -1, np.int64)
            return np.memmap(directory / name, np.int64, mode="r+", shape=shape)

        self.kv = memory("kv", (num_pages, page_size))
        self.tokens = memory("tokens", (num_rows, length))
        self.page_size = page_size

    def run(self, step: PrefillStep | DecodeStep, worker_id: str = "") -> StepDone:
        rows = np.frombuffer(step.rows, np.int32)
        context_lens = np.frombuffer(step.context_lens, np.int32)
        table = np.frombuffer(step.page_table, np.int32).reshape(len(rows), step.table_width)
        sampling = np.frombuffer(step.sampling, ROW_SAMPLING)
        if isinstance(step, PrefillStep):
            token_ids = np.frombuffer(step.token_ids, np.int32)
            cu = np.frombuffer(step.cu_q_lens, np.int32)
            new = [token_ids[cu[i] : cu[i + 1]] for i in range(len(rows))]
            samples = np.frombuffer(step.samples, np.bool_)
        else:
            new = [self.tokens[r, c - 1 : c] for r, c in zip(rows, context_lens, strict=True)]
            samples = np.ones(len(rows), np.bool_)
        sampled = np.zeros(len(rows), np.int32)
        for i, row in enumerate(rows):
            end = int(context_lens[i])
            for position, token in zip(range(end - len(new[i]), end), new[i], strict=True):
                page = table[i, position // self.page_size]
                assert page > 0, "a real token was sent to the scratch page"
                self.kv[page, position % self.page_size] = token
                self.tokens[row, position] = token
            if samples[i]:
                context = [
                    int(self.kv[table[i, p // self.page_size], p % self.page_size])
                    for p in range(end)
                ]
                sampled[i] = next_token(context, int(sampling["seed"][i]))
                self.tokens[row, end] = sampled[i]
        return StepDone(worker_id, step.step_id, sampled.tobytes(), device_s=0.0, num_compiles=0)
