"""One running request, between the link to the coordinator and whoever reads its events."""

import asyncio
from typing import Final

from semipd_jax.client.observations import RequestTimes
from semipd_jax.errors import EngineError, RequestFailedError, UnavailableError
from semipd_jax.messages import Admitted, Done
from semipd_jax.request import Delta, Event, Finished, FinishReason, Started, TokenLogprob, Usage
from semipd_jax.text.output import OutputText

MAX_DELTA_TOKENS: Final = 1024
"""With all their logprobs, these fit into the 4 MiB that gRPC clients accept by default."""


class Stream:
    """What has arrived and was not read yet. Unread tokens are merged into few Deltas, so that a
    slow reader costs no more memory than its own request's output.

    Attributes:
      handle: the request's number on the link.
      times: for whoever observes the request.
    """

    def __init__(
        self,
        handle: int,
        request_id: str,
        prompt_len: int,
        text: OutputText,
        times: RequestTimes,
    ) -> None:
        self.handle = handle
        self.request_id = request_id
        self.prompt_len = prompt_len
        self.times = times
        self._output = text
        self._cached_tokens = 0
        self._num_tokens = 0
        self._started: Started | None = None
        self._token_ids: list[int] = []
        self._text = ""
        self._logprobs: list[TokenLogprob] = []
        self._finished: Finished | None = None
        self._error: EngineError | None = None
        self._arrived = asyncio.Event()

    @property
    def is_stopped(self) -> bool:
        """A stop string is complete; the coordinator may not know yet."""
        return self._output.matched_stop is not None

    async def next(self) -> Event:
        """Waits for the next event; raises the error that ended the request."""
        while (event := self._take()) is None:
            self._arrived.clear()
            await self._arrived.wait()
        return event

    def admitted(self, message: Admitted) -> None:
        self._cached_tokens = message.cached_tokens
        self._started = Started(self.prompt_len, message.cached_tokens, message.queue_s)
        self._arrived.set()

    def token(self, token_id: int, logprob: TokenLogprob | None) -> bool:
        """Takes a token in. Returns True if it completes a stop string: what follows is dropped,
        and the coordinator must be told."""
        if self.is_stopped:
            return False
        self._num_tokens += 1
        self._token_ids.append(token_id)
        self._text += self._output.push(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._arrived.set()
        return self._output.matched_stop is not None

    def done(self, message: Done) -> None:
        """The coordinator has let go of the request."""
        if message.error is not None:
            self.fail(message.error)
            return
        self._text += self._output.finish()
        matched = self._output.matched_stop
        self._finished = Finished(
            reason=message.reason if matched is None else FinishReason.STOP,
            usage=Usage(self.prompt_len, self._num_tokens, self._cached_tokens),
            matched_stop=message.stop_token_id if matched is None else matched,
            timings=message.timings,
        )
        self._arrived.set()

    def refused(self, error: EngineError) -> None:
        self._error = error
        self._arrived.set()

    def fail(self, reason: str) -> None:
        """The request ends without a result."""
        self.refused(RequestFailedError(reason) if self._num_tokens else UnavailableError(reason))

    def _take(self) -> Event | None:
        if self._started is not None:
            started, self._started = self._started, None
            return started
        if self._token_ids or self._text:
            return self._take_delta()
        if self._error is not None:
            raise self._error
        return self._finished

    def _take_delta(self) -> Delta:
        token_ids, self._token_ids = _cut(self._token_ids)
        logprobs, self._logprobs = _cut(self._logprobs)
        text = ""
        if not self._token_ids:  # text may lag behind its tokens, but not run ahead
            text, self._text = self._text, ""
        return Delta(tuple(token_ids), text, tuple(logprobs))


def _cut[T](values: list[T]) -> tuple[list[T], list[T]]:
    return values[:MAX_DELTA_TOKENS], values[MAX_DELTA_TOKENS:]
