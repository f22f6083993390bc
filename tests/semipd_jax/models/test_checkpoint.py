"""Weights arrive as they were written; whatever is wrong with a directory is said by name."""

import dataclasses
import json
import shutil
import subprocess
import sys
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import load_reference, write_checkpoint
from safetensors.numpy import load_file, save_file

from semipd_jax.config import LoadFormat
from semipd_jax.errors import CheckpointError
from semipd_jax.models.checkpoint import open_checkpoint
from semipd_jax.models.registry import load_spec, parse_spec
from semipd_jax.models.spec import WeightSpec
from semipd_jax.storage.manifest import numpy_dtype

TINY: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}

CONFIG = json.dumps(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
)


def open_(directory, load_format: LoadFormat = "auto", seed=0):
    return open_checkpoint(directory, load_spec(directory), load_format, seed)


def read_all(directory, dtype="float32", load_format: LoadFormat = "auto", seed=0):
    spec, checkpoint = load_spec(directory), open_(directory, load_format, seed)
    leaves = {w.path: np.empty(w.shape, numpy_dtype(dtype)) for w in spec.weights}
    for weight in spec.weights:
        checkpoint.read(weight, leaves[weight.path])
    return leaves


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("models") / "sharded", "qwen2", max_shard_size="20KB", **TINY
    )


@pytest.fixture
def model(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "model")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------- reading


def test_fused_weights_are_their_sources_one_below_the_other(sharded):
    leaves = read_all(sharded)
    theirs = {k: v.numpy() for k, v in load_reference(sharded).state_dict().items()}
    attention = "model.layers.1.self_attn"
    for path, names in {
        "layers/1/attention/qkv_proj": [f"{attention}.{p}_proj.weight" for p in "qkv"],
        "layers/1/attention/qkv_bias": [f"{attention}.{p}_proj.bias" for p in "qkv"],
        "layers/1/mlp/gate_up_proj": [
            f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up")
        ],
        "lm_head": ["lm_head.weight"],
    }.items():
        np.testing.assert_array_equal(leaves[path], np.concatenate([theirs[n] for n in names]))
    assert sum(leaf.size for leaf in leaves.values()) == sum(x.size for x in theirs.values())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtype_conversion_rounds_to_nearest(tmp_path, stored, wanted):
    directory = write_checkpoint(tmp_path / "model", "llama", dtype=stored, **TINY)
    leaf = read_all(directory, wanted)["embed_tokens"]
    reference = load_reference(directory).state_dict()["model.embed_tokens.weight"]
    expected = reference.to(getattr(torch, wanted)).float().numpy()
    np.testing.assert_array_equal(leaf.astype(np.float32), expected)


def test_a_value_beyond_float16_is_refused_when_read(model):
    shard, name = _shard_of(model, "model.norm.weight")
    save_file({**load_file(shard), name: np.full(32, 1e6, np.float32)}, shard)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*float16"):
        read_all(model, "float16")
    assert read_all(model, "bfloat16")["norm"][0] == np.float32(1e6).astype(ml_dtypes.bfloat16)


def test_tied_embeddings_may_or_may_not_come_with_a_head(tmp_path):
    directory = write_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=True, **TINY)
    without_head = read_all(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, directory / "model.safetensors")
    with_head = read_all(directory)
    assert without_head.keys() == with_head.keys()
    assert "lm_head" not in with_head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_needs_little_memory_beside_the_target(tmp_path, dtype):
    rows, columns = 32_768, 512  # 64 MiB in float32
    weight = WeightSpec("w", (2 * rows, columns), ("a", "b"), ((rows, columns),) * 2)
    half = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    save_file({"a": half, "b": half + 1}, tmp_path / "model.safetensors")
    spec = dataclasses.replace(parse_spec(json.loads(CONFIG)), weights=(weight,))
    checkpoint = open_checkpoint(tmp_path, spec, "auto", 0)
    out = np.empty(weight.shape, numpy_dtype(dtype))

    tracemalloc.start()
    checkpoint.read(weight, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 40 * 2**20
    np.testing.assert_array_equal(out[:rows], half.astype(out.dtype))
    np.testing.assert_array_equal(out[rows:], (half + 1).astype(out.dtype))


# ---------------------------------------------------------------- refusals


def test_pickles_are_refused_and_why(model):
    for path in model.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_(model)
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*run code"):
        open_(model)


def test_a_missing_tensor_is_named(model):
    edit_json(model / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks 12.*model\.layers\.2\..*and 7 more"):
        open_(model)


def test_an_unexpected_tensor_is_named(model):
    edit_json(model / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"unexpected 12.*model\.layers\.1\."):
        open_(model)


def test_a_wrong_shape_is_named(model):
    edit_json(model / "config.json", intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight has shape .*implies"):
        open_(model)


def test_a_wrong_dtype_is_named(model):
    shard, name = _shard_of(model, "model.norm.weight")
    save_file({**load_file(shard), name: np.ones(32, np.int32)}, shard)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype I32"):
        open_(model)


def test_a_tensor_in_two_shards_is_refused(model):
    shards = sorted(model.glob("*.safetensors"))
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(second))
    save_file({**first, name: second[name]}, shards[0])
    with pytest.raises(CheckpointError, match=f"{shards[0].name} has unexpected.*{name}"):
        open_(model)


def test_a_tensor_that_its_shard_lacks_is_refused(model):
    shard, name = _shard_of(model, "model.norm.weight")
    save_file({k: v for k, v in load_file(shard).items() if k != name}, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name} lacks 1 .*model\.norm\.weight"):
        open_(model)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "model.bin", "..", 7])
def test_an_index_that_leads_elsewhere_is_refused(model, file):
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shutil.copy(model / weight_map["model.norm.weight"], model.parent / "outside.safetensors")
    edit_json(index, weight_map={**weight_map, "model.norm.weight": file})
    with pytest.raises(CheckpointError, match=r"weight_map: model\.norm\.weight is .*allowed"):
        open_(model)


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors"])
def test_a_malformed_index_is_refused(model, weight_map):
    edit_json(model / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(CheckpointError, match="weight_map"):
        open_(model)


def test_a_missing_shard_is_named(model):
    shard, _ = _shard_of(model, "model.norm.weight")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_(model)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_shard_is_named(model, keep):
    shard, _ = _shard_of(model, "model.norm.weight")
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged"):
        open_(model)


# ---------------------------------------------------------------- dummy weights


def test_dummy_weights_need_nothing_but_a_config(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG)
    leaves = read_all(tmp_path, load_format="dummy", seed=3)
    assert (leaves["norm"] == 1).all()
    assert (leaves["layers/0/mlp_norm"] == 1).all()
    matrix = leaves["layers/0/mlp/gate_up_proj"]
    assert matrix.std() == pytest.approx(0.02, rel=0.05)
    assert abs(matrix.mean()) < 1e-3
    assert not np.array_equal(matrix, leaves["layers/1/mlp/gate_up_proj"])


def test_dummy_weights_depend_on_the_seed_and_not_on_dtype_or_order(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG)
    leaves = read_all(tmp_path, load_format="dummy", seed=3)
    again = read_all(tmp_path, "bfloat16", load_format="dummy", seed=3)
    other = read_all(tmp_path, load_format="dummy", seed=4)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf.astype(ml_dtypes.bfloat16))
        assert path.endswith("norm") or not np.array_equal(leaf, other[path])

    weight = load_spec(tmp_path).weights[-1]
    alone = np.empty(weight.shape, np.float32)
    open_(tmp_path, "dummy", seed=3).read(weight, alone)
    np.testing.assert_array_equal(alone, leaves[weight.path])


def test_large_dummy_weights_have_no_two_equal_rows():
    weight = WeightSpec("lm_head", (2048, 1024), (), ())
    out = np.empty(weight.shape, np.float32)
    spec = parse_spec(json.loads(CONFIG))
    open_checkpoint("nowhere", spec, "dummy", 0).read(weight, out)
    assert len(np.unique(out[:, :8], axis=0)) == 2048


# ---------------------------------------------------------------- generation settings


def generation(directory, config=None, **settings):
    (directory / "config.json").write_text(json.dumps({**json.loads(CONFIG), **(config or {})}))
    if settings:
        (directory / "generation_config.json").write_text(json.dumps(settings))
    return open_(directory, "dummy")


def test_end_of_sequence_tokens(tmp_path):
    assert generation(tmp_path).eos_token_ids == ()
    assert generation(tmp_path, {"eos_token_id": 2}).eos_token_ids == (2,)
    both = generation(tmp_path, {"eos_token_id": 2}, eos_token_id=[5, 7])
    assert both.eos_token_ids == (5, 7)
    for bad in ("2", [1, None], 320, -1, True):
        with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
            generation(tmp_path, eos_token_id=bad)


def test_recommended_sampling(tmp_path):
    checkpoint = generation(
        tmp_path,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=None,
        max_new_tokens=100,
        do_sample=True,
        num_beams=4,
    )
    assert checkpoint.generation_defaults == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 100,
    }
    for field, value in {"temperature": "hot", "top_p": 2.0, "top_k": 1.5}.items():
        with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field}"):
            generation(tmp_path, **{field: value})


# ---------------------------------------------------------------- layering


def test_reading_checkpoints_does_not_import_jax():
    code = (
        "import sys, semipd_jax.models.checkpoint, semipd_jax.models.registry; "
        "sys.exit(sorted({'jax', 'flax', 'orbax', 'torch'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def _shard_of(model, name):
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / index["weight_map"][name], name
