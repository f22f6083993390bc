"""The model families there are, and which of them a model directory holds. No jax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from semipd_jax.errors import CheckpointError
from semipd_jax.models import llama_spec
from semipd_jax.models.fields import Fields, read_json
from semipd_jax.models.spec import ModelFamily, ModelSpec

_FAMILIES: Final[Mapping[str, ModelFamily]] = {
    architecture: family for family in llama_spec.FAMILIES for architecture in family.architectures
}


def load_spec(directory: str | Path) -> ModelSpec:
    """Reads `directory`/config.json. Raises CheckpointError for what is not supported."""
    return parse_spec(read_json(Path(directory) / "config.json"))


def parse_spec(values: Mapping[str, Any]) -> ModelSpec:
    """What a config.json says. Raises CheckpointError for what is not supported."""
    fields = Fields(values, "config.json")
    architectures = fields.texts("architectures")
    fields.require(len(architectures) == 1, "architectures", "exactly one")
    family = family_of(architectures[0])
    fields.require(not fields.has("auto_map"), "auto_map", "none: remote code is never run")
    fields.require(
        not fields.has("quantization_config"),
        "quantization_config",
        "none: quantised weights are not supported",
    )
    return family.parse(values)


def family_of(architecture: str) -> ModelFamily:
    if architecture not in _FAMILIES:
        raise CheckpointError(
            f"architecture {architecture!r} is not supported; allowed: {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[architecture]
