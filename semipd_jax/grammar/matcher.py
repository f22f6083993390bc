"""One request's place in its grammar, and the masks that follow from it."""

from collections.abc import Iterable
from typing import Final

import numpy as np
from jaxtyping import Int32
from llguidance import LLMatcher

_MAX_MESSAGE_CHARS: Final = 300


class GrammarError(Exception):
    """A grammar cannot be compiled, or cannot be followed any further within its limits."""


class Matcher:
    """Consumes the tokens of an output, one by one. Not to be used by two threads at once.

    An end-of-sequence token is allowed where the output may end, if the request stops at it.

    Args:
      matcher: at the beginning; this object owns it.
      vocab_size: bits of a mask.
      eos_token_ids: what ends an output in the grammar's eyes.
      stop_token_ids: what ends the request.
      min_tokens: none of the latter may come before this many tokens.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        stop_token_ids: Iterable[int],
        min_tokens: int,
    ) -> None:
        self._matcher = matcher
        self._num_bytes = -(-vocab_size // 32) * 4
        self._never = _ids(set(eos_token_ids) - set(stop_token_ids))
        self._not_yet = _ids(set(stop_token_ids))
        self._min_tokens = min_tokens
        self._num_tokens = 0

    def accept(self, token_id: int) -> None:
        """Goes on by a token that the last mask allowed. Raises GrammarError if it cannot."""
        self._num_tokens += 1
        if not self._matcher.consume_token(token_id):
            raise GrammarError(_message(self._matcher))

    def mask(self) -> bytes | None:
        """The tokens that may come next, as `messages.TokenMasks` has them; None if none may.

        Raises GrammarError where that takes more than the limits allow.
        """
        if self._matcher.is_stopped():
            check(self._matcher)
            return None
        mask = self._matcher.compute_bitmask()
        check(self._matcher)
        bits = np.frombuffer(mask, np.uint8)[: self._num_bytes].copy()
        _clear(bits, self._never)
        if self._num_tokens < self._min_tokens:
            _clear(bits, self._not_yet)
        return bits.tobytes() if bits.any() else None


def check(matcher: LLMatcher) -> None:
    """Raises GrammarError if the matcher has failed."""
    if matcher.is_error():
        raise GrammarError(_message(matcher))


def _message(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().split())[:_MAX_MESSAGE_CHARS]


def _clear(bits: np.ndarray, ids: Int32[np.ndarray, " n"]) -> None:
    np.bitwise_and.at(bits, ids >> 3, ~(1 << (ids & 7)).astype(np.uint8))


def _ids(ids: Iterable[int]) -> Int32[np.ndarray, " n"]:
    return np.array(sorted(ids), np.int32)
