"""`python -m semipd_jax.convert`: a model directory from Hugging Face to Orbax, or back.

Weights pass through a scratch file beside the result, not through memory: a model larger than
RAM can be converted. The result appears under its name only when it is complete.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file
from tqdm import tqdm

from semipd_jax.errors import CheckpointError
from semipd_jax.models.checkpoint import Checkpoint, open_checkpoint
from semipd_jax.models.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE
from semipd_jax.models.checkpoint.orbax import SUBDIRECTORY
from semipd_jax.models.fields import read_json
from semipd_jax.models.module import nest
from semipd_jax.models.registry import load_spec
from semipd_jax.models.spec import WeightSpec
from semipd_jax.storage.manifest import lay_out, numpy_dtype

Format = Literal["orbax", "huggingface"]
WeightDtype = Literal["float32", "bfloat16", "float16"]

_SHARD_BYTES: Final = 4 * 2**30
_CHUNK_BYTES: Final = 16 * 2**20
_COMPANIONS: Final = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
    "README.md",
)


def convert(
    source: Path, target: Path, *, to: Format | None = None, dtype: WeightDtype | None = None
) -> None:
    """Writes the model in `source` to `target`, which must be absent or an empty directory.

    `to` is by default the format that `source` does not have; `dtype` is by default the one that
    config.json states. Raises CheckpointError, and then leaves `target` as it was.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory")
    spec = load_spec(source)
    checkpoint = open_checkpoint(source, spec, "auto", seed=0)
    to = to or ("huggingface" if checkpoint.format == "orbax" else "orbax")
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        leaves = _gather(
            checkpoint, spec.weights, dtype or spec.checkpoint_dtype, Path(scratch, "weights")
        )
        result = Path(scratch, "model")
        result.mkdir()
        _write_companions(source, result, dtype)
        if to == "orbax":
            _write_orbax(result / SUBDIRECTORY, leaves)
        else:
            _write_huggingface(result, spec.weights, leaves)
        result.rename(target)


def _gather(
    checkpoint: Checkpoint, weights: tuple[WeightSpec, ...], dtype: str, scratch: Path
) -> dict[str, np.ndarray]:
    """All weights in final layout by path, as views into the scratch file."""
    region = lay_out("weights", ((w.path, w.shape, dtype) for w in weights))
    memory = np.memmap(scratch, np.uint8, "w+", shape=region.num_bytes).view(np.ndarray)
    leaves = {}
    with tqdm(total=region.num_bytes, desc="reading", unit="B", unit_scale=True) as progress:
        for weight, entry in zip(weights, region.arrays, strict=True):
            flat = memory[entry.offset : entry.offset + entry.num_bytes]
            leaf = flat.view(numpy_dtype(dtype)).reshape(entry.shape)
            checkpoint.read(weight, leaf)
            leaves[weight.path] = leaf
            progress.update(entry.num_bytes)
    return leaves


def _write_orbax(directory: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """As `StandardCheckpointer` would, but in chunks and with few leaves in memory at a time."""
    tree = nest(leaves)
    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused; Orbax warns if it is absent
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry,
        save_concurrent_gb=1 + max(leaf.nbytes for leaf in leaves.values()) // 10**9,
    )
    with ocp.Checkpointer(handler) as writer:
        writer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=in_chunks))


def _write_huggingface(
    directory: Path, weights: tuple[WeightSpec, ...], leaves: Mapping[str, np.ndarray]
) -> None:
    shards = list(_shards(dict(_sources(weights, leaves))))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    for name, shard in zip(names, tqdm(shards, desc="writing"), strict=True):
        save_file(shard, directory / name, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / name)  # not 0600
    if len(shards) > 1:
        weight_map = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total_size = sum(leaf.nbytes for leaf in leaves.values())
        _write_json(
            directory / INDEX_FILE,
            {"metadata": {"total_size": total_size}, "weight_map": weight_map},
        )


def _sources(
    weights: tuple[WeightSpec, ...], leaves: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face name → the rows of a leaf that came from it."""
    for weight in weights:
        ends = np.cumsum([shape[0] for shape in weight.source_shapes])[:-1]
        yield from zip(weight.sources, np.split(leaves[weight.path], ends), strict=True)


def _shards(tensors: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Groups tensors, in order, to at most a shard's bytes (but at least one tensor)."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_companions(source: Path, target: Path, dtype: WeightDtype | None) -> None:
    """config.json, with its dtype brought up to date, and the files that are not weights."""
    config = read_json(source / "config.json")
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    _write_json(target / "config.json", config)
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m semipd_jax.convert", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR")
    parser.add_argument("--to", dest="target", type=Path, required=True, metavar="DIR")
    parser.add_argument("--format", choices=get_args(Format), help="default: the other one")
    parser.add_argument("--dtype", choices=get_args(WeightDtype), help="default: config.json's")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    try:
        convert(options.source, options.target, to=options.format, dtype=options.dtype)
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
