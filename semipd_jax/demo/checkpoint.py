"""A trained model as a Hugging Face model directory."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from semipd_jax.demo.tokenizer import tokenizer_config
from semipd_jax.models.module import Params, flatten
from semipd_jax.models.spec import ModelSpec


def write_metadata(directory: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Writes everything but the weights; `config` is config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    settings = tokenizer_config(config["max_position_embeddings"])
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", ids)
    _write_json(directory / "tokenizer_config.json", settings)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)


def write_weights(directory: Path, spec: ModelSpec, params: Params) -> None:
    """Replaces model.safetensors, in bfloat16, at once: a reader sees the old file or the new."""
    partial, final = directory / "model.safetensors.partial", directory / "model.safetensors"
    save_file(source_tensors(spec, params), partial, metadata={"format": "pt"})
    os.replace(partial, final)


def source_tensors(spec: ModelSpec, params: Params) -> dict[str, np.ndarray]:
    """Parameters under their names in a Hugging Face checkpoint, rounded to bfloat16."""
    leaves = flatten(params)
    tensors = {}
    for weight in spec.weights:
        rows = np.cumsum([shape[0] for shape in weight.source_shapes])[:-1]
        parts = np.split(np.asarray(leaves[weight.path].astype(jnp.bfloat16)), rows)
        tensors |= {
            name: np.ascontiguousarray(part)
            for name, part in zip(weight.sources, parts, strict=True)
        }
    return tensors


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
