"""Bounds of the lists in a body, those of the gRPC contract: checked as soon as it is read, before
anything is converted, tokenised or sent on."""

from collections.abc import Sized
from typing import Final

from semipd_server.limits import MAX_ENTRIES, MAX_PROMPTS, MODEL_LENGTH, check_number
from semipd_server.openai.schema import Body, CompletionRequest, Sampling

_CHOICE: Final = "semipd.v1.Texts.texts"
_CONTRACT: Final = {
    "messages": "semipd.v1.ChatMessages.messages",
    "tokens": "semipd.v1.DetokenizeRequest.ids",
    "stop": "semipd.v1.SamplingParams.stop",
    "stop_token_ids": "semipd.v1.SamplingParams.stop_token_ids",
    "logit_bias": "semipd.v1.SamplingParams.logit_bias",
    "guided_choice": _CHOICE,
}
"""Name of a field here → there."""


def check_entries(body: Body, max_model_len: int) -> None:
    """Raises InvalidRequestError for a field that has more entries than allowed."""
    for field, name in _CONTRACT.items():
        entries = getattr(body, field, None)
        if isinstance(entries, list | dict):
            limit = MAX_ENTRIES[name]
            check_number(field, entries, max_model_len if limit == MODEL_LENGTH else limit)
    if isinstance(body, Sampling) and body.structured_outputs is not None:
        texts = body.structured_outputs.get("choice")
        if isinstance(texts, Sized):
            check_number("structured_outputs.choice", texts, MAX_ENTRIES[_CHOICE])
    if isinstance(body, CompletionRequest) and isinstance(body.prompt, list):
        _check_prompts(body.prompt, max_model_len)


def _check_prompts(prompt: list[str | int | list[int]], max_model_len: int) -> None:
    """Of token ids, or of prompts that may be token ids."""
    if prompt and isinstance(prompt[0], int):
        check_number("prompt", prompt, max_model_len, is_too_long=True)
        return
    check_number("prompt", prompt, MAX_PROMPTS)
    for index, entry in enumerate(prompt):
        if isinstance(entry, list):
            check_number(f"prompt[{index}]", entry, max_model_len, is_too_long=True)
