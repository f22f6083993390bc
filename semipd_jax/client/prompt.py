"""Prompts to token ids without holding up the event loop."""

import asyncio
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from semipd_jax.client.fair_threads import FairThreads
from semipd_jax.errors import InvalidRequestError, UnavailableError
from semipd_jax.text.tokenizer import ChatMessage, Tokenizer

type Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or a conversation."""

MAX_BYTES_PER_TOKEN: Final = 16
"""Text longer than this times the model length is refused unread, and what a chat template writes
as soon as it has more characters: no real text is that dense."""
MAX_CHAT_MESSAGES: Final = 4096
_INLINE_SIZE: Final = 2048  # characters or ids that are quicker done than handed to a thread
_TIMEOUT_S: Final = 60.0


class PromptEncoder:
    """Short texts are encoded at once, long ones and chats in threads. Chats have their own, so
    that a slow template keeps no text waiting. Callers share the threads evenly."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._max_size = MAX_BYTES_PER_TOKEN * max_model_len
        self._threads = FairThreads(2, "tokenizer")
        self._chat_threads = FairThreads(2, "chat")

    async def encode(self, prompt: object, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a `Prompt`; those of a conversation always have their special tokens.

        Raises:
          InvalidRequestError: the prompt has a wrong type, or is much too long.
        """
        if isinstance(prompt, str):
            self._check_text(prompt)

            def encode_text() -> list[int]:
                return self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

            if len(prompt) <= _INLINE_SIZE:
                return tuple(encode_text())
            return tuple(await _in_thread(self._threads, encode_text))
        if not isinstance(prompt, Sequence | np.ndarray):
            raise InvalidRequestError(
                f"the prompt is a {type(prompt).__name__}; allowed: text, token ids, or messages",
                field="prompt",
            )
        if len(prompt) and isinstance(prompt[0], Mapping):
            messages = self._check_chat(prompt)

            def encode_chat() -> list[int]:
                return self._tokenizer.encode_chat(messages, max_chars=self._max_size)

            return tuple(await _in_thread(self._chat_threads, encode_chat))
        return _check_ids(prompt)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Raises InvalidRequestError if there are more ids than the model's length."""
        if len(token_ids) > self._max_model_len:
            raise InvalidRequestError(
                f"{len(token_ids)} ids; allowed: at most the model length of {self._max_model_len}",
                field="ids",
            )

        def decode() -> str:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        if len(token_ids) <= _INLINE_SIZE:
            return decode()
        return await _in_thread(self._threads, decode)

    def close(self) -> None:
        for threads in (self._threads, self._chat_threads):
            threads.close()

    def _check_text(self, text: str, field: str = "prompt") -> None:
        limit = self._max_size
        try:
            size = len(text) if len(text) > limit else len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text is not Unicode: {error}", field=field) from error
        if size > limit:
            raise InvalidRequestError(
                f"the text has at least {size} bytes; allowed: at most {limit} for a model length "
                f"of {self._max_model_len} tokens",
                field=field,
                is_too_long=True,
            )

    def _check_chat(self, messages: Sequence[Any] | np.ndarray) -> list[dict[str, str]]:
        if len(messages) > MAX_CHAT_MESSAGES:
            raise InvalidRequestError(
                f"{len(messages)} messages; allowed: at most {MAX_CHAT_MESSAGES}", field="chat"
            )
        checked: list[dict[str, str]] = []
        for message in messages:
            fields = dict(message) if isinstance(message, Mapping) else {}
            names = fields.keys() - {"name"}
            if names != {"role", "content"} or not all(map(_is_str, fields.values())):
                raise InvalidRequestError(
                    f"message {len(checked)} is {message!r:.80}; allowed: a role, a content and "
                    "perhaps a name, all strings",
                    field="chat",
                )
            checked.append(fields)
        self._check_text("".join(text for m in checked for text in m.values()), field="chat")
        return checked


async def _in_thread[T](threads: FairThreads, work: Callable[[], T]) -> T:
    try:
        return await asyncio.wait_for(threads.run(work), _TIMEOUT_S)
    except TimeoutError as error:
        raise UnavailableError(f"tokenising took longer than {_TIMEOUT_S:.0f} s") from error


def _check_ids(token_ids: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, token_ids))
    except TypeError as error:
        raise InvalidRequestError(
            f"the prompt has an element that is no token id: {error}", field="prompt"
        ) from error


def _is_str(value: Any) -> bool:
    return isinstance(value, str)
