"""Token windows to train on and to measure the loss on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from semipd_jax.demo.corpus import Document


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of a token stream, each moved back to the start of a line.

    A window is the end-of-text token (id 0), as before every prompt, then `length` tokens.

    Attributes:
      stream: documents in a row, each opened by the end-of-text token.
      line_starts: ascending indices into `stream`.
    """

    stream: Int32[np.ndarray, " tokens"]
    line_starts: Int32[np.ndarray, " lines"]

    def tiles(self, length: int, first: int = 1) -> Int32[np.ndarray, " W"]:
        """Offsets that cut the stream from `first` on."""
        return np.arange(first, len(self.stream) - length, length, dtype=np.int32)

    def at(self, offsets: Int32[np.ndarray, " B"], length: int) -> Int32[np.ndarray, "B window"]:
        nearest = np.searchsorted(self.line_starts, offsets, side="right") - 1
        starts = self.line_starts[nearest]
        tokens = self.stream[starts[:, None] + np.arange(length, dtype=np.int32)]
        return np.pad(tokens, ((0, 0), (1, 0)))

    def shuffled(
        self, batch_size: int, length: int, seed: int
    ) -> Iterator[Int32[np.ndarray, "B window"]]:
        """Endless batches. Each pass over the stream has its own tiling and order."""
        rng = np.random.default_rng(seed)
        while True:
            offsets = rng.permutation(self.tiles(length, 1 + int(rng.integers(length))))
            for i in range(0, len(offsets) - batch_size + 1, batch_size):
                yield self.at(offsets[i : i + batch_size], length)


def make_windows(tokenizer: Tokenizer, documents: Iterable[Document]) -> Windows:
    encodings = tokenizer.encode_batch([document.text for document in documents])
    stream = np.concatenate([np.asarray(e.ids, np.int32) for e in encodings])
    ends_line = np.array(
        [i == 0 or "\n" in tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    )
    line_starts = np.flatnonzero(ends_line[stream]).astype(np.int32) + np.int32(1)
    return Windows(stream, line_starts)
