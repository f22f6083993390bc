"""The text of one request's output."""

from collections.abc import Sequence

from semipd_jax.request import SamplingParams
from semipd_jax.text.detokenizer import Detokenizer
from semipd_jax.text.stop import StopStrings
from semipd_jax.text.tokenizer import Tokenizer


class OutputText:
    """Detokenised, and cut at the first stop string. A stop token leaves no text, like a stop
    string, unless the request asks for it.

    Attributes:
      may_stop: there are stop strings; to find them in time, tokens must be pushed one by one.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, prompt, skip_special_tokens=sampling.skip_special_tokens
        )
        self.may_stop = bool(sampling.stop)
        self._stop_strings = StopStrings(sampling.stop, include_stop=sampling.include_stop)
        self._tokens_before_stop = sampling.min_tokens
        self._hidden = () if sampling.include_stop else frozenset(sampling.stop_token_ids)

    @property
    def matched_stop(self) -> str | None:
        """The stop string that was found; no text comes after it."""
        return self._stop_strings.matched

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        self._tokens_before_stop -= len(token_ids)
        text = self._detokenizer.push([t for t in token_ids if t not in self._hidden])
        return text if self._tokens_before_stop >= 0 else self._stop_strings.push(text)

    def finish(self) -> str:
        """The rest, when no token follows."""
        text = self._stop_strings.push(self._detokenizer.finish())
        return text + self._stop_strings.finish()
