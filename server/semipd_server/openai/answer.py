"""Events of an engine to a whole answer, or to chunks of one."""

import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from semipd_jax.request import Delta, Event, Finished, Started, TokenLogprob
from semipd_server.choices import Choices, events
from semipd_server.gate import Engine
from semipd_server.openai.reply import Reply
from semipd_server.openai.schema import CachedTokens, Completion, StreamOptions, Usage


class Format(Protocol):
    """What distinguishes the kinds of answers. All methods return a choice of an answer."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> Any | None:
        """The first chunk, if there is one without tokens."""
        ...

    def chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> Any: ...

    def closing(self, index: int, finish_reason: str, stop_reason: str | int | None) -> Any:
        """The last chunk."""
        ...

    def whole(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish_reason: str,
        stop_reason: str | int | None,
    ) -> Any: ...


@dataclass(slots=True)
class _Progress:
    """What one choice has brought so far."""

    cached_tokens: int = 0
    num_tokens: int = 0
    text: list[str] = field(default_factory=list[str])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    end: tuple[str, str | int | None] = ("", None)


class Answer:
    """One answer to one client.

    Args:
      wanted: its choices.
      stop_token_ids: that the client named.
    """

    def __init__(
        self, engine: Engine, form: Format, wanted: Choices, stop_token_ids: Sequence[int]
    ) -> None:
        self._engine = engine
        self._form = form
        self._wanted = wanted
        self._stop_token_ids = stop_token_ids
        self._id = f"{form.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._progress = [_Progress() for _ in range(len(wanted))]

    async def send_whole(self, reply: Reply) -> None:
        async with aclosing(events(self._engine, self._id, self._wanted)) as happening:
            async for index, event in happening:
                self._take(index, event)
                if isinstance(event, Delta):
                    self._progress[index].text.append(event.text)
                    self._progress[index].logprobs += event.logprobs
        choices = [
            self._form.whole(index, "".join(p.text), p.logprobs, *p.end)
            for index, p in enumerate(self._progress)
        ]
        await reply.json(self._encode(self._form.whole_object, choices, self._usage()))

    async def send_stream(self, reply: Reply, options: StreamOptions) -> None:
        form = self._form
        happening = events(self._engine, self._id, self._wanted)
        async with aclosing(happening), reply.kept_alive():
            async for index, event in happening:
                self._take(index, event)
                match event:
                    case Started():
                        choice = form.opening(index)
                    case Delta(text=text, logprobs=logprobs):
                        choice = form.chunk(index, text, logprobs) if text or logprobs else None
                    case Finished():
                        choice = form.closing(index, *self._progress[index].end)
                if choice is not None:
                    await reply.event(self._chunk([choice], options))
        if options.include_usage:
            await reply.event(self._encode(form.chunk_object, [], self._usage()))
        await reply.end()

    def _take(self, index: int, event: Event) -> None:
        progress = self._progress[index]
        match event:
            case Started(cached_tokens=cached_tokens):
                progress.cached_tokens = cached_tokens
            case Delta(token_ids=token_ids):
                progress.num_tokens += len(token_ids)
            case Finished():
                progress.end = self._end_of(event)

    def _end_of(self, finished: Finished) -> tuple[str, str | int | None]:
        """OpenAI's reason, and what vLLM adds: the stop string or stop token of the request."""
        stop = finished.matched_stop
        is_named = isinstance(stop, str) or stop in self._stop_token_ids
        return finished.reason.value, stop if is_named else None

    def _usage(self) -> Usage:
        """Prompts count once, however many choices they have."""
        wanted = self._wanted
        prompt = sum(len(request.prompt_token_ids) for request in wanted.requests)
        cached = sum(p.cached_tokens for p in self._progress[:: len(wanted.seeds)])
        completion = sum(p.num_tokens for p in self._progress)
        return Usage(prompt, completion, prompt + completion, CachedTokens(cached))

    def _chunk(self, choices: list[Any], options: StreamOptions) -> bytes:
        if options.continuous_usage_stats:
            return self._encode(self._form.chunk_object, choices, self._usage())
        usage = None if options.include_usage else msgspec.UNSET
        return self._encode(self._form.chunk_object, choices, usage)

    def _encode(
        self, kind: str, choices: list[Any], usage: Usage | msgspec.UnsetType | None
    ) -> bytes:
        name = self._engine.info.name
        return msgspec.json.encode(Completion(self._id, kind, self._created, name, choices, usage))
