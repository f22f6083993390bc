"""Bounds of repeated fields, checked on the message as it arrived: before anything is copied out of
it, tokenised or sent on. Values inside are checked where they are used."""

from collections.abc import Mapping, Sized
from typing import Any, Final

from semipd_jax.client.prompt import MAX_CHAT_MESSAGES
from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import (
    MAX_CHOICE_TEXTS,
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

MODEL_LENGTH: Final = -1
"""In `MAX_ENTRIES`: as many as the model's length."""

MAX_ENTRIES: Final[Mapping[str, int]] = {
    "semipd.v1.TokenIds.ids": MODEL_LENGTH,
    "semipd.v1.DetokenizeRequest.ids": MODEL_LENGTH,
    "semipd.v1.ChatMessages.messages": MAX_CHAT_MESSAGES,
    "semipd.v1.SamplingParams.stop": MAX_STOP_STRINGS,
    "semipd.v1.SamplingParams.stop_token_ids": MAX_STOP_TOKEN_IDS,
    "semipd.v1.SamplingParams.logit_bias": MAX_LOGIT_BIAS,
    "semipd.v1.Texts.texts": MAX_CHOICE_TEXTS,
}
"""Full name of a repeated field of a request → most entries."""

MAX_CHOICES: Final = 16
"""Most completions of one prompt (`n`)."""
MAX_PROMPTS: Final = 256
"""Most prompts in one request."""


def check_entries(
    message: Any, max_model_len: int, entries: Mapping[str, int] = MAX_ENTRIES, path: str = ""
) -> None:
    """Raises InvalidRequestError for a repeated field that has more entries than allowed: those of
    its full name in `entries`, otherwise none."""
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        if field.is_repeated:
            limit = entries.get(field.full_name, 0)
            limit = max_model_len if limit == MODEL_LENGTH else limit
            check_number(name, value, limit)
        elif field.message_type is not None:
            check_entries(value, max_model_len, entries, f"{name}.")


def check_number(field: str, entries: Sized, limit: int, *, is_too_long: bool = False) -> None:
    """Raises InvalidRequestError for a field that has more entries than allowed.

    Args:
      is_too_long: whether such a request is too long for the model.
    """
    if len(entries) > limit:
        raise InvalidRequestError(
            f"{field} has {len(entries)} entries; allowed: at most {limit}",
            field=field,
            is_too_long=is_too_long,
        )
