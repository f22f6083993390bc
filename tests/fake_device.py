"""A worker's arithmetic on plain Python memory: runs step messages the way the real one does.

Every token depends on all tokens before it, read back through the page table, so one wrong or
overwritten slot changes everything that follows. As real KV does, a slot also knows all tokens up
to its own: a page that was computed after another prefix is noticed.
"""

from pathlib import Path

import numpy as np

from semipd_jax.messages import ROW_SAMPLING, DecodeStep, PrefillStep, StepDone, ToWorker, parts

VOCAB = 50


def next_token(tokens: list[int], seed: int, allowed: list[int] | None = None) -> int:
    """The token that follows `tokens`, one of those `allowed`."""
    value = seed
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return value % VOCAB if allowed is None else allowed[value % len(allowed)]


def may_follow(output: list[int]) -> list[int]:
    """A grammar: the tokens that may come after `output`; none if it is complete."""
    if sum(output) % 11 == 5:
        return []
    return [token for token in range(VOCAB) if (token + sum(output)) % 7 in (1, 3)]


def mask_of(output: list[int]) -> bytes | None:
    """The mask of `may_follow`."""
    bits = np.zeros(64, np.uint8)
    bits[may_follow(output)] = 1
    return np.packbits(bits, bitorder="little").tobytes() if bits.any() else None


def extended(prefix: int, token: int) -> int:
    """A number that tells sequences of tokens apart, for one more token."""
    return (prefix * 1009 + token + 1) % (2**31 - 1)


class FakeDevice:
    """Its memory is its own, or three arrays in a directory that several processes share."""

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
        self.prefix = memory("prefix", (num_pages, page_size))
        self.tokens = memory("tokens", (num_rows, length))
        self.page_size = page_size

    def run(self, step: ToWorker, worker_id: str = "") -> StepDone:
        sampled = b"".join(map(self._run, parts(step)))
        return StepDone(worker_id, step.step_id, sampled, device_s=0.0, num_compiles=0)

    def _run(self, step: PrefillStep | DecodeStep) -> bytes:
        rows = np.frombuffer(step.rows, np.int32)
        context_lens = np.frombuffer(step.context_lens, np.int32)
        table = np.frombuffer(step.page_table, np.int32).reshape(len(rows), step.table_width)
        sampling = np.frombuffer(step.sampling, ROW_SAMPLING)
        if isinstance(step, PrefillStep):
            for history in step.history:
                cached = np.frombuffer(history.token_ids, np.int32)
                self.tokens[history.row] = -1
                self.tokens[history.row, : len(cached)] = cached
            token_ids = np.frombuffer(step.token_ids, np.int32)
            cu = np.frombuffer(step.cu_q_lens, np.int32)
            new = [token_ids[cu[i] : cu[i + 1]] for i in range(len(rows))]
            samples = np.frombuffer(step.samples, np.bool_)
        else:
            new = [self.tokens[r, c - 1 : c] for r, c in zip(rows, context_lens, strict=True)]
            samples = np.ones(len(rows), np.bool_)
        sampled = np.zeros(len(rows), np.int32)
        allowed = _allowed(step)
        for i, row in enumerate(rows):
            end = int(context_lens[i])
            self._write(table[i], row, end - len(new[i]), new[i])
            if samples[i]:
                assert len(new[i]), "there is no hidden state to sample from"
                context = self._read(table[i], end)
                assert self.tokens[row, :end].tolist() == context, "the row lacks some history"
                sampled[i] = next_token(context, int(sampling["seed"][i]), allowed.get(i))
                self.tokens[row, end] = sampled[i]
        return sampled.tobytes()

    def _write(self, pages: np.ndarray, row: int, start: int, tokens: np.ndarray) -> None:
        before = self.prefix[self._slot(pages, start - 1)] if start else 0
        for position, token in enumerate(tokens, start):
            slot = self._slot(pages, position)
            assert slot[0] > 0, "a real token was sent to the scratch page"
            before = extended(int(before), int(token))
            self.kv[slot], self.prefix[slot] = token, before
            self.tokens[row, position] = token

    def _read(self, pages: np.ndarray, end: int) -> list[int]:
        context: list[int] = []
        before = 0
        for position in range(end):
            slot = self._slot(pages, position)
            context.append(int(self.kv[slot]))
            before = extended(before, context[-1])
            assert self.prefix[slot] == before, "KV was computed after other tokens"
        return context

    def _slot(self, pages: np.ndarray, position: int) -> tuple[int, int]:
        return int(pages[position // self.page_size]), position % self.page_size


def _allowed(step: PrefillStep | DecodeStep) -> dict[int, list[int]]:
    """Tokens that may be sampled, by position in the step, where not all may."""
    if step.masks is None:
        return {}
    words = np.frombuffer(step.masks.words, np.uint8).reshape(-1, 4 * step.masks.width)
    bits = np.unpackbits(words, axis=1, bitorder="little")
    places = np.frombuffer(step.masks.places, np.int32)
    return {int(i): np.flatnonzero(row).tolist() for i, row in zip(places, bits, strict=True)}
