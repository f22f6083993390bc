"""Token ids to text, as they come."""

import codecs
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Final

from semipd_jax.text.tokenizer import Tokenizer

_CONTEXT: Final = 4
"""Tokens that decide how the next one reads: as many as a character has bytes. Fewer could not tell
a complete character from a broken one."""
_MAX_WINDOW: Final = 12
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text that output tokens add to a prompt.

    `push` returns what tokens make certain, `finish` the rest. Joined, they are what the tokenizer
    decodes for prompt and output, less what it decodes for the prompt. An incomplete
    character is held back until it is complete or cannot be completed any more; one at the end of
    the prompt is completed by the output. Bytes that a byte-fallback tokenizer spells as tokens
    are decoded as UTF-8 one by one, where the tokenizer itself gives up a whole run of them for one
    broken byte.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._decode = tokenizer.backend.decode
        self._size = tokenizer.size
        self._silent = tokenizer.skipped_ids if skip_special_tokens else tokenizer.unknown_ids
        self._high_bytes = tokenizer.high_bytes
        self._byte_ids = tokenizer.byte_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # the last visible tokens
        self._certain = 0  # characters of the window's text that were returned
        self.push(self._last_visible(prompt))

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens. Special and unknown ones have none."""
        visible = [t for t in token_ids if t not in self._silent and t < self._size]
        if not self._high_bytes:
            return self._push_pieces(visible) if visible else ""
        runs = groupby(visible, self._high_bytes.__contains__)
        texts = (self._push_bytes(run) if high else self._push_pieces(run) for high, run in runs)
        return "".join(texts)

    def _push_pieces(self, token_ids: Iterable[int]) -> str:
        broken = self._utf8.decode(b"", final=True) if self._high_bytes else ""
        self._window += token_ids
        text = self._decode(self._window, skip_special_tokens=False)
        start, self._certain = self._certain, _certain_length(text)
        new = text[start : self._certain]
        if len(self._window) > _MAX_WINDOW:
            self._trim()
        return broken + new

    def finish(self) -> str:
        """What is left when no token follows: an incomplete character, as U+FFFD."""
        return self._rest_of_window() + self._utf8.decode(b"", final=True)

    def _push_bytes(self, token_ids: Iterable[int]) -> str:
        """High bytes bypass the window; in it, an "a" stands for them as text that has begun."""
        rest = self._rest_of_window()
        self._window, self._certain = [self._byte_ids[ord("a")]], 1
        return rest + self._utf8.decode(bytes(self._high_bytes[t] for t in token_ids))

    def _rest_of_window(self) -> str:
        text = self._decode(self._window, skip_special_tokens=False)
        start, self._certain = self._certain, len(text)
        return text[start:]

    def _trim(self) -> None:
        del self._window[:-_CONTEXT]
        self._certain = _certain_length(self._decode(self._window, skip_special_tokens=False))

    def _last_visible(self, prompt: Sequence[int]) -> list[int]:
        visible = (t for t in reversed(prompt) if t not in self._silent and t < self._size)
        return list(islice(visible, _CONTEXT))[::-1]


def _certain_length(text: str) -> int:
    """A replacement character at the end may turn into something else; one before it may not."""
    return len(text) - text.endswith(_REPLACEMENT)
