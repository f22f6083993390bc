"""One running request, between the link to the coordinator and whoever reads its events."""

import asyncio
import logging
from typing import Final

from semipd_jax.client.observations import RequestTimes
from semipd_jax.client.turns import Turns
from semipd_jax.errors import EngineError, RequestFailedError, UnavailableError
from semipd_jax.messages import Admitted, Done
from semipd_jax.request import Delta, Event, Finished, FinishReason, Started, TokenLogprob, Usage
from semipd_jax.text.output import OutputText

MAX_DELTA_TOKENS: Final = 1024
"""With all their logprobs, these fit into the 4 MiB that gRPC clients accept by default."""

_log = logging.getLogger(__name__)


class Stream:
    """What has arrived and was not read yet. Unread tokens are merged into few Deltas, so that a
    slow reader costs no more memory than its own request's output.

    Attributes:
      handle: the request's number on the link.
      caller: see `line.CALLER`.
      times: for whoever observes the request.
    """

    def __init__(
        self,
        handle: int,
        request_id: str,
        prompt_len: int,
        text: OutputText,
        times: RequestTimes,
        turns: Turns,
        caller: tuple[str, ...],
    ) -> None:
        self.handle = handle
        self.request_id = request_id
        self.prompt_len = prompt_len
        self.times = times
        self.caller = caller
        self._turns = turns
        self._awaits_news = False
        self._output = text
        self._cached_tokens = 0
        self._num_tokens = 0
        self._started: Started | None = None
        self._token_ids: list[int] = []
        self._undecoded: list[int] = []
        self._text = ""
        self._logprobs: list[TokenLogprob] = []
        self._finished: Finished | None = None
        self._error: EngineError | None = None
        self._begun = asyncio.Event()

    @property
    def is_stopped(self) -> bool:
        """A stop string is complete; the coordinator may not know yet."""
        return self._output.matched_stop is not None

    @property
    def has_failed(self) -> bool:
        """It ends with an error."""
        return self._error is not None

    async def next(self) -> Event:
        """Waits for the next event and this stream's turn, which lasts until the next call or
        `close`; raises the error that ended the request."""
        self._turns.over(self)
        self._begun.clear()
        self._awaits_news = True
        if self._has_news():
            self._ask()
        await self._begun.wait()
        return self._take()

    def close(self) -> None:
        """Nobody reads any more."""
        self._awaits_news = False
        self._turns.over(self)

    def begin(self) -> None:
        """See `turns.Waiter`."""
        self._begun.set()

    def admitted(self, message: Admitted) -> None:
        self._cached_tokens = message.cached_tokens
        self._started = Started(self.prompt_len, message.cached_tokens, message.queue_s)
        self._ask()

    def token(self, token_id: int, logprob: TokenLogprob | None) -> bool:
        """Takes a token in. Returns True if it completes a stop string: what follows is dropped,
        and the coordinator must be told."""
        if self.is_stopped:
            return False
        self._num_tokens += 1
        self._token_ids.append(token_id)
        self._undecoded.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        if self._output.may_stop:
            self._decode()
        self._ask()
        return self._output.matched_stop is not None

    def done(self, message: Done) -> None:
        """The coordinator has let go of the request."""
        if message.error is not None:
            self.fail(message.error)
            return
        self._decode(is_end=True)
        matched = self._output.matched_stop
        self._finished = Finished(
            reason=message.reason if matched is None else FinishReason.STOP,
            usage=Usage(self.prompt_len, self._num_tokens, self._cached_tokens),
            matched_stop=message.stop_token_id if matched is None else matched,
            timings=message.timings,
        )
        self._ask()

    def refused(self, error: EngineError) -> None:
        self._error = error
        self._ask()

    def fail(self, reason: str) -> None:
        """The request ends without a result."""
        self.refused(RequestFailedError(reason) if self._num_tokens else UnavailableError(reason))

    def _ask(self) -> None:
        """For a turn: there are news."""
        if self._awaits_news:
            self._awaits_news = False
            self._turns.ask(self)

    def _has_news(self) -> bool:
        news = (self._started, self._token_ids, self._text, self._error, self._finished)
        return any(news)

    def _take(self) -> Event:
        if self._started is not None:
            started, self._started = self._started, None
            return started
        if self._token_ids or self._text:
            return self._take_delta()
        if self._error is not None:
            raise self._error
        assert self._finished is not None
        return self._finished

    def _take_delta(self) -> Delta:
        token_ids, self._token_ids = _cut(self._token_ids)
        logprobs, self._logprobs = _cut(self._logprobs)
        text = ""
        if not self._token_ids:  # text may lag behind its tokens, but not run ahead
            self._decode()
            text, self._text = self._text, ""
        return Delta(tuple(token_ids), text, tuple(logprobs))

    def _decode(self, *, is_end: bool = False) -> None:
        """All tokens at once that came since the last time. What goes wrong with one request's text
        must not touch the others."""
        token_ids, self._undecoded = self._undecoded, []
        try:
            self._text += self._output.push(token_ids)
            if is_end:
                self._text += self._output.finish()
        except Exception:
            _log.exception("the text of request %s failed", self.request_id)
            self.refused(RequestFailedError("the text of this request cannot be made"))


def _cut[T](values: list[T]) -> tuple[list[T], list[T]]:
    return values[:MAX_DELTA_TOKENS], values[MAX_DELTA_TOKENS:]
