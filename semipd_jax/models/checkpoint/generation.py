"""generation_config.json: when generation ends and which sampling the authors recommend."""

import math
from pathlib import Path
from typing import Any, Final

from semipd_jax.errors import CheckpointError, InvalidRequestError
from semipd_jax.models.fields import Fields, read_json
from semipd_jax.request import SamplingParams, validate_sampling

_FILE: Final = "generation_config.json"
_NUMBERS: Final = ("temperature", "top_p", "min_p", "repetition_penalty")
_INTEGERS: Final = {"top_k": "top_k", "max_new_tokens": "max_tokens"}


def eos_token_ids(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence tokens, from generation_config.json or else from config.json."""
    for fields in (_read(directory, _FILE), _read(directory, "config.json")):
        if fields.has("eos_token_id"):
            ids = fields.integers("eos_token_id")
            allowed = f"token ids, 0 to {vocab_size - 1}"
            fields.require(all(0 <= i < vocab_size for i in ids), "eos_token_id", allowed)
            return ids
    return ()


def sampling_defaults(directory: Path, vocab_size: int) -> dict[str, Any]:
    """Fields of SamplingParams that generation_config.json sets."""
    fields = _read(directory, _FILE)
    defaults: dict[str, Any] = {
        name: fields.number(name, above=-math.inf) for name in _NUMBERS if fields.has(name)
    }
    for name, ours in _INTEGERS.items():
        if fields.has(name):
            defaults[ours] = fields.integer(name, minimum=0)
    try:
        validate_sampling(SamplingParams(**defaults), vocab_size=vocab_size)
    except InvalidRequestError as error:
        raise CheckpointError(f"{_FILE}: {error}") from error
    return defaults


def _read(directory: Path, name: str) -> Fields:
    path = directory / name
    return Fields(read_json(path) if path.is_file() else {}, name)
