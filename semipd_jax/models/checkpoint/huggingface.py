"""Hugging Face safetensors: one file, or shards with an index."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from semipd_jax.errors import CheckpointError
from semipd_jax.models.checkpoint.blocks import check_names, check_tensor, copy_cast, row_blocks
from semipd_jax.models.fields import Fields, read_json
from semipd_jax.models.spec import WeightSpec

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_REDUNDANT_SUFFIXES: Final = ("rotary_emb.inv_freq", "lm_head.weight")
"""Tensors that some checkpoints have beside the model's own: old rotary tables, and the output
head of a model whose head is its embedding."""


def is_present(directory: Path) -> bool:
    return (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()


class HuggingFaceReader:
    """Maps the files and checks them against the weight table; reads weights on demand."""

    def __init__(self, directory: Path, weights: Iterable[WeightSpec]) -> None:
        expected = {
            name: shape
            for weight in weights
            for name, shape in zip(weight.sources, weight.source_shapes, strict=True)
        }
        tensors = _open_tensors(directory)
        present = {
            name for name in tensors if name in expected or not name.endswith(_REDUNDANT_SUFFIXES)
        }
        check_names(str(directory), expected.keys(), present)
        for name, shape in expected.items():
            dtype = str(tensors[name].get_dtype())
            found = tuple(tensors[name].get_shape())
            check_tensor(f"{directory}: {name}", found, _DTYPES.get(dtype, dtype), shape)
        self._tensors = tensors

    def read(self, weight: WeightSpec, out: np.ndarray) -> None:
        """Fills `out` with the weight's sources, one below the other."""
        first = 0
        for name, shape in zip(weight.sources, weight.source_shapes, strict=True):
            target = out[first : first + shape[0]]
            for rows in row_blocks(shape, out.itemsize):
                copy_cast(self._tensors[name][rows], target[rows], name)
            first += shape[0]


def _open_tensors(directory: Path) -> dict[str, Any]:
    """Every tensor of the directory by name, as a lazy slice of its mapped file."""
    if (directory / SINGLE_FILE).is_file():
        return _open_file(directory / SINGLE_FILE)
    shard_of = _read_index(directory / INDEX_FILE)
    tensors: dict[str, Any] = {}
    for shard in sorted(set(shard_of.values())):
        found = _open_file(directory / shard)
        listed = {name for name, file in shard_of.items() if file == shard}
        check_names(str(directory / shard), listed, found.keys())
        tensors |= found
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name. Files are in the directory of the index, nowhere else."""
    index = Fields(read_json(path), path.name)
    index.require(index.has("weight_map"), "weight_map", "an object")
    shard_of = index.section("weight_map")
    files = {name: shard_of.text(name) for name in shard_of.names()}
    for name, file in files.items():
        plain = Path(file).name == file and file.endswith(".safetensors")
        shard_of.require(plain, name, "names of .safetensors files beside the index")
    return files


def _open_file(path: Path) -> dict[str, Any]:
    try:
        file = safe_open(path, framework="np")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not safetensors: {error}") from error
