"""Recognises what a model directory holds and opens it. Nothing in it is ever executed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from semipd_jax.config import LoadFormat
from semipd_jax.errors import CheckpointError
from semipd_jax.models.checkpoint import dummy, generation, huggingface, orbax
from semipd_jax.models.spec import ModelSpec, WeightSpec

type WeightFormat = Literal["safetensors", "orbax", "dummy"]
type ReadWeight = Callable[[WeightSpec, np.ndarray], None]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened and validated model directory.

    Attributes:
      read: fills an array with one weight, converted to the array's dtype (float32, bfloat16 or
        float16). The array is C-contiguous and has the weight's shape. Needs a few tens of
        megabytes beside it (for Orbax: one stored chunk). Raises CheckpointError if the data is
        damaged or does not fit the dtype.
      eos_token_ids: tokens that end a generation.
      generation_defaults: fields of `request.SamplingParams` that the model's authors recommend.
    """

    format: WeightFormat
    read: ReadWeight
    eos_token_ids: tuple[int, ...]
    generation_defaults: Mapping[str, Any]


def open_checkpoint(
    directory: str | Path, spec: ModelSpec, load_format: LoadFormat, seed: int
) -> Checkpoint:
    """Opens `directory` and checks every weight's name, shape and dtype before any is read.

    `seed` is that of the dummy weights. Raises CheckpointError.
    """
    directory = Path(directory)
    weight_format = detect_format(directory) if load_format == "auto" else load_format
    return Checkpoint(
        format=weight_format,
        read=_open(directory, spec, weight_format, seed),
        eos_token_ids=generation.eos_token_ids(directory, spec.vocab_size),
        generation_defaults=generation.sampling_defaults(directory, spec.vocab_size),
    )


def detect_format(directory: Path) -> WeightFormat:
    """What kind of weights `directory` holds; safetensors win if there are both."""
    if huggingface.is_present(directory):
        return "safetensors"
    if orbax.is_present(directory):
        return "orbax"
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds weights only as pickle ({pickles[0]}), which can run code when "
            "read and is refused; convert them to safetensors (save_pretrained of transformers)"
        )
    raise CheckpointError(
        f"{directory} holds no weights; allowed: {huggingface.SINGLE_FILE}, "
        f"{huggingface.INDEX_FILE} with its shards, or an Orbax tree in {orbax.SUBDIRECTORY}/"
    )


def _open(directory: Path, spec: ModelSpec, weight_format: WeightFormat, seed: int) -> ReadWeight:
    match weight_format:
        case "safetensors":
            return huggingface.HuggingFaceReader(directory, spec.weights).read
        case "orbax":
            return orbax.OrbaxReader(directory, spec.weights).read
        case "dummy":
            return dummy.DummyReader(seed).read
