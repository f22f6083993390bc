"""/v1/chat/completions: messages in, a message out. The model's own template writes the prompt."""

from collections.abc import Sequence
from typing import Any, Final

from semipd_jax.request import TokenLogprob
from semipd_jax.text.tokenizer import ChatMessage as EngineMessage
from semipd_server.gate import Engine
from semipd_server.openai import schema
from semipd_server.openai.answer import Answer
from semipd_server.openai.choices import choices
from semipd_server.openai.errors import bad_request
from semipd_server.openai.schema import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Message,
    TopLogprob,
)
from semipd_server.openai.tokens import TokenTexts

_ROLES: Final = {"developer": "system"}
"""OpenAI's new name of a role → the one that templates know."""
_UNSUPPORTED: Final = (
    *("refusal", "annotations", "audio", "function_call"),
    *("tool_calls", "tool_call_id"),
)


class ChatFormat:
    """An `answer.Format`."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, *, with_logprobs: bool) -> None:
        self._texts = texts
        self._with_logprobs = with_logprobs

    def opening(self, index: int) -> ChatChunkChoice:
        return ChatChunkChoice(index, ChatDelta(role="assistant", content=""))

    def chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> ChatChunkChoice:
        return ChatChunkChoice(index, ChatDelta(content=text), self._logprobs(logprobs))

    def closing(
        self, index: int, finish_reason: str, stop_reason: str | int | None
    ) -> ChatChunkChoice:
        return ChatChunkChoice(index, ChatDelta(), None, finish_reason, stop_reason)

    def whole(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish_reason: str,
        stop_reason: str | int | None,
    ) -> ChatChoice:
        found = self._logprobs(logprobs)
        return ChatChoice(index, ChatMessage(text), found, finish_reason, stop_reason)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs([self._token(p) for p in logprobs])

    def _token(self, logprob: TokenLogprob) -> schema.TokenLogprob:
        top = [TopLogprob(*self._entry(i, value)) for i, value in logprob.top]
        return schema.TokenLogprob(*self._entry(logprob.token_id, logprob.logprob), top)

    def _entry(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        texts = self._texts
        return texts.text_of(token_id), logprob, list(texts.bytes_of(token_id))


async def chat(engine: Engine, texts: TokenTexts, request: ChatRequest) -> Answer:
    """Raises ApiError or an EngineError if the request can never succeed."""
    if request.top_logprobs and not request.logprobs:
        raise bad_request(
            f"top_logprobs is {request.top_logprobs}; allowed: 0 or null unless logprobs is true",
            "top_logprobs",
        )
    token_ids = await engine.client.encode(conversation(request.messages))
    asked: dict[str, Any] = {"max_tokens": _max_tokens(request)}
    if request.logprobs:
        asked["logprobs"] = request.top_logprobs or 0
    form = ChatFormat(texts, with_logprobs=request.logprobs)
    wanted = await choices(engine, [token_ids], request, **asked)
    return Answer(engine, form, wanted, request.stop_token_ids or ())


def conversation(messages: Sequence[Message]) -> list[EngineMessage]:
    """Messages as templates take them.

    Raises:
      ApiError: there are none, or one has anything but text.
    """
    if not messages:
        raise bad_request("messages is empty; allowed: at least one message", "messages")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(index: int, message: Message) -> EngineMessage:
    for field in _UNSUPPORTED:
        if getattr(message, field):
            name = f"messages[{index}].{field}"
            raise bad_request(f"{name} is not supported; allowed: null", name)
    content = message.content
    if content is None:
        name = f"messages[{index}].content"
        raise bad_request(f"{name} is null; allowed: text", name)
    if not isinstance(content, str):
        for k, part in enumerate(content):
            if part.type != "text":
                name = f"messages[{index}].content[{k}].type"
                raise bad_request(f"{name} is {part.type!r:.80}; allowed: 'text'", name)
            if part.text is None:
                name = f"messages[{index}].content[{k}].text"
                raise bad_request(f"{name} is null; allowed: text", name)
        content = "\n".join(part.text or "" for part in content)
    written = {"role": _ROLES.get(message.role, message.role), "content": content}
    return written if message.name is None else written | {"name": message.name}


def _max_tokens(request: ChatRequest) -> int | None:
    if request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens
