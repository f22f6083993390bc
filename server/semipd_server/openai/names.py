"""Errors name what the client has sent, not what became of it."""

from semipd_jax.errors import InvalidRequestError
from semipd_server.openai.schema import ChatRequest, Sampling
from semipd_server.openai.structured import param_of


def as_sent(error: InvalidRequestError, request: Sampling) -> InvalidRequestError:
    """The error, about a field of `request`."""
    text, name = str(error), _name(error.field, request)
    if text.startswith(error.field):
        text = name + text.removeprefix(error.field)
    return InvalidRequestError(text, field=name, is_too_long=error.is_too_long)


def _name(field: str, request: Sampling) -> str:
    if field.startswith("structured_outputs"):
        return param_of(request) or field
    if not isinstance(request, ChatRequest):
        return field
    match field:
        case "prompt":
            return "messages"
        case "logprobs":
            return "top_logprobs"
        case "max_tokens" if request.max_completion_tokens is not None:
            return "max_completion_tokens"
        case _:
            return field
