"""From what a request says about sampling to what the engine is told."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_type_hints

import msgspec

from semipd_jax.errors import CheckpointError, InvalidRequestError
from semipd_jax.request import (
    SamplingParams,
    StructuredOutputs,
    validate_lengths,
    validate_prompt,
    validate_sampling,
)

_TYPES: Final = get_type_hints(SamplingParams)
_FORM_FIELDS: Final = tuple(field.name for field in dataclasses.fields(StructuredOutputs))
_GENERATION_CONFIG: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Name in generation_config.json → name in SamplingParams. `do_sample` is left to the client, who
asks for greedy decoding with temperature 0."""


def load_generation_defaults(directory: str) -> dict[str, Any]:
    """The sampling defaults that a model ships in generation_config.json, by our names.

    Raises:
      CheckpointError: the file is damaged, or a value is not allowed.
    """
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
        found = {name: config.get(key) for key, name in _GENERATION_CONFIG.items()}
        defaults = parse_sampling(found)
        validate_sampling(SamplingParams(**defaults), vocab_size=1)
    except (ValueError, AttributeError, InvalidRequestError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return defaults


def parse_sampling(given: SamplingParams | Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are set, with their types checked. In a mapping, None means unset.

    A mapping may give one stop string as it is, `logit_bias` as a mapping, and `structured_outputs`
    as one, its `json` being a schema or the text of one.

    Raises:
      InvalidRequestError: a name or a type is wrong.
    """
    if isinstance(given, SamplingParams):
        given = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _TYPES:
            allowed = ", ".join(_TYPES)
            raise InvalidRequestError(
                f"{name!r} is not a sampling parameter; allowed: {allowed}", field=name
            )
        if value is None:
            continue
        if name == "stop" and isinstance(value, str):
            value = (value,)
        if name == "logit_bias" and isinstance(value, Mapping):
            value = tuple(value.items())
        if name == "structured_outputs" and isinstance(value, Mapping):
            value = _form(value)
        try:
            fields[name] = msgspec.convert(value, _TYPES[name])
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"{name} is {value!r:.80}: {error}", field=name) from error
    return fields


def _form(given: Mapping[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in _FORM_FIELDS:
            raise InvalidRequestError(
                f"structured_outputs has {name!r:.80}; allowed: {', '.join(_FORM_FIELDS)}",
                field="structured_outputs",
            )
    form = {name: value for name, value in given.items() if value is not None}
    if isinstance(form.get("json"), Mapping):
        form["json"] = msgspec.json.encode(form["json"]).decode()
    return form


@dataclass(frozen=True, slots=True)
class CheckedSampling:
    """What a request says about sampling, checked but for what depends on its prompt.

    Attributes:
      params: with the model's defaults for what the request does not say.
      has_max_tokens: whether the request itself says `max_tokens`.
    """

    params: SamplingParams
    has_max_tokens: bool

    def after(
        self, prompt_token_ids: tuple[int, ...], *, vocab_size: int, max_model_len: int
    ) -> SamplingParams:
        """With `max_tokens`, as this prompt leaves room for them.

        Raises:
          InvalidRequestError: the prompt can never be served, or not with this sampling.
        """
        params = self.params
        validate_prompt(
            prompt_token_ids,
            max_tokens=params.max_tokens if self.has_max_tokens else None,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
        )
        if not self.has_max_tokens:
            room = max_model_len - len(prompt_token_ids)
            most = room if params.max_tokens is None else min(params.max_tokens, room)
            params = dataclasses.replace(params, max_tokens=most)
            validate_lengths(params)
        return params


def check_sampling(
    given: SamplingParams | Mapping[str, Any], defaults: Mapping[str, Any], *, vocab_size: int
) -> CheckedSampling:
    """Everything `given`, then `defaults` (by `load_generation_defaults`), then SamplingParams'.

    A SamplingParams says everything, so the model's defaults do not apply to it.

    Raises:
      InvalidRequestError: it can never be served.
    """
    asked = parse_sampling(given)
    fields = ({} if isinstance(given, SamplingParams) else dict(defaults)) | asked
    params = SamplingParams(**fields)
    validate_sampling(params, vocab_size=vocab_size)
    return CheckedSampling(params, has_max_tokens="max_tokens" in asked)


def fold_seed(seed: int) -> int:
    """A seed of up to 64 bits in the 32 that the sampler takes; seeds below 2**32 stay."""
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF
