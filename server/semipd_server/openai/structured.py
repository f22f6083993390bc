"""Structured outputs, by OpenAI's name and by vLLM's present and former ones."""

from typing import Any, Final

from semipd_jax.request import ANY_OBJECT
from semipd_server.openai.errors import bad_request
from semipd_server.openai.schema import Sampling

_FORMER: Final = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}
_FORMATS: Final = "'text', 'json_object' or 'json_schema'"


def param_of(request: Sampling) -> str | None:
    """The field that asks for a form.

    Raises:
      ApiError: there are several.
    """
    names = ("response_format", "structured_outputs", *_FORMER)
    given = [name for name in names if getattr(request, name) is not None]
    if len(given) > 1:
        raise bad_request(f"{' and '.join(given)} are set; allowed: one of them", given[0])
    return given[0] if given else None


def form_of(request: Sampling) -> dict[str, Any] | None:
    """The fields of `request.StructuredOutputs` that are set; None if the text is free.

    Raises:
      ApiError: what asks for a form is wrong in itself.
    """
    param = param_of(request)
    if param is None:
        return None
    value = getattr(request, param)
    if param == "response_format":
        return _response_format(value)
    if param == "structured_outputs":
        return _structured_outputs(value)
    return {_FORMER[param]: value}


def _response_format(given: dict[str, Any]) -> dict[str, Any] | None:
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return {"json": ANY_OBJECT}
        case "json_schema":
            named = given.get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            if not isinstance(schema, dict):
                name = "response_format.json_schema.schema"
                raise bad_request(f"{name} is {schema!r:.80}; allowed: a JSON schema", name)
            return {"json": schema}
        case kind:
            name = "response_format.type"
            raise bad_request(f"{name} is {kind!r:.80}; allowed: {_FORMATS}", name)


def _structured_outputs(given: dict[str, Any]) -> dict[str, Any]:
    """vLLM's, which has a `json_object` too."""
    fields = {name: value for name, value in given.items() if value is not None}
    if fields.pop("json_object", False):
        fields["json"] = fields.get("json", ANY_OBJECT)
    return fields
