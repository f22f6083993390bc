"""Conversions are lossless, loadable by the stock libraries, and never half done."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import torch
import transformers
from checkpoints import load_reference, write_checkpoint
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from semipd_jax import convert as convert_module
from semipd_jax.convert import convert, main
from semipd_jax.errors import CheckpointError
from semipd_jax.models.checkpoint import open_checkpoint
from semipd_jax.models.llama import Llama
from semipd_jax.models.module import abstract_params, flatten
from semipd_jax.models.registry import load_spec
from semipd_jax.storage.manifest import numpy_dtype

TINY: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
MANY_LAYERS: dict[str, Any] = {**TINY, "num_hidden_layers": 11}  # "10" sorts before "2" as text


def tensors(directory):
    """Name → (dtype, bytes) of every safetensors tensor in a directory."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                array = file.get_tensor(name)
                found[name] = (array.dtype, array.shape, array.tobytes())
    return found


def read_all(directory):
    spec = load_spec(directory)
    checkpoint = open_checkpoint(directory, spec, "auto", seed=0)
    leaves = {w.path: np.empty(w.shape, numpy_dtype(spec.checkpoint_dtype)) for w in spec.weights}
    for weight in spec.weights:
        checkpoint.read(weight, leaves[weight.path])
    return leaves


def _truncate_data(params):
    for path in params.glob("**/d/*"):
        path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(
        tmp_path / "model", "qwen3", dtype="bfloat16", attention_bias=True, **MANY_LAYERS
    )


def test_there_and_back_is_bit_identical(model, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "_SHARD_BYTES", 40_000)
    convert(model, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert tensors(tmp_path / "back") == tensors(model)
    assert load_spec(tmp_path / "back").config == load_spec(model).config
    assert len({path.stat().st_mode for path in (tmp_path / "back").iterdir()}) == 1
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for copy in ("orbax", "back"):
            assert (tmp_path / copy / name).read_bytes() == (model / name).read_bytes()


def test_both_formats_give_the_same_leaves(model, tmp_path):
    convert(model, tmp_path / "orbax")
    ours, theirs = read_all(model), read_all(tmp_path / "orbax")
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.tobytes() == theirs[path].tobytes()


def test_stock_orbax_restores_into_the_module(model, tmp_path):
    convert(model, tmp_path / "orbax")
    spec = load_spec(model)
    graphdef, abstract = abstract_params(spec, jnp.bfloat16)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(tmp_path / "orbax" / "params", abstract)
    module = nnx.merge(graphdef, params)
    assert isinstance(module, Llama)
    for path, leaf in read_all(model).items():
        assert np.asarray(flatten(params)[path]).tobytes() == leaf.tobytes()


def test_a_tree_saved_by_stock_orbax_can_be_served(model, tmp_path):
    spec = load_spec(model)
    module = Llama(spec.config, dtype=jnp.float32, rngs=nnx.Rngs(5))
    params = nnx.to_pure_dict(nnx.state(module))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "trained" / "params", params)
    (tmp_path / "trained" / "config.json").write_bytes((model / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path / "trained", spec, "auto", seed=0)
    assert checkpoint.format == "orbax"
    for weight in spec.weights:
        out = np.empty(weight.shape, np.float32)
        checkpoint.read(weight, out)
        np.testing.assert_array_equal(out, flatten(params)[weight.path])


def test_transformers_loads_the_result(tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=True, **TINY)
    convert(source, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="huggingface")
    token_ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = (load_reference(d)(token_ids).logits for d in (tmp_path / "back", source))
    assert torch.equal(ours, theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.decode(tokenizer.encode("round trip")) == "round trip"


def test_dtype_is_converted_and_written_to_the_config(model, tmp_path):
    convert(model, tmp_path / "wide", to="huggingface", dtype="float32")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    narrow, wide = read_all(model), read_all(tmp_path / "wide")
    for path, leaf in narrow.items():
        np.testing.assert_array_equal(wide[path], leaf.astype(np.float32))


def test_a_large_leaf_is_stored_in_chunks_and_read_chunk_by_chunk(model, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "_CHUNK_BYTES", 4000)
    convert(model, tmp_path / "orbax")
    files = tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": (tmp_path / "orbax" / "params").as_uri() + "/"}
    ).result()
    chunks = [
        key for key in files.list().result() if key.startswith(b"lm_head/") and key[-1:] != b"y"
    ]
    assert len(chunks) > 2
    expected = read_all(model)
    for path, leaf in read_all(tmp_path / "orbax").items():
        assert leaf.tobytes() == expected[path].tobytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda params: (params / "_METADATA").write_text("{}"), "lacks .*tensor"),
        (lambda params: (params / "_METADATA").write_text('{"tree_metadata": 1}'), "tree_metadata"),
        (lambda params: (params / "manifest.ocdbt").unlink(), "cannot read"),
        (lambda params: (params / "manifest.ocdbt").write_bytes(b"x"), "cannot read"),
        (_truncate_data, "cannot read|is damaged"),
    ],
)
def test_a_damaged_orbax_tree_is_refused(damage, message, tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama", **TINY)
    convert(source, tmp_path / "orbax")
    damage(tmp_path / "orbax" / "params")
    with pytest.raises(CheckpointError, match=message):
        read_all(tmp_path / "orbax")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "lacks 6 .*layers/2/"),
        ({"num_hidden_layers": 1}, "unexpected 6 .*layers/1/"),
        ({"intermediate_size": 64}, "layers/0/mlp/.* has shape .*implies"),
    ],
)
def test_an_orbax_tree_of_another_model_is_refused(changes, message, tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama", **TINY)
    convert(source, tmp_path / "orbax")
    config = tmp_path / "orbax" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        read_all(tmp_path / "orbax")


def test_an_occupied_target_is_left_alone(model, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        convert(model, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.txt"]


def test_a_failed_conversion_leaves_nothing(tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama", **TINY)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][:] = 1e6
    save_file(weights, source / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="float16"):
        convert(source, tmp_path / "target", dtype="float16")
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: cannot read .*config\.json"):
        main(["--from", str(tmp_path), "--to", str(tmp_path / "target")])
    with pytest.raises(SystemExit):
        main(["--from", str(tmp_path), "--to", "x", "--format", "pickle"])
    assert "pickle" in capsys.readouterr().err


def test_the_command_converts(model, tmp_path):
    platforms = jax.config.jax_platforms
    try:
        main(["--from", str(model), "--to", str(tmp_path / "orbax")])
    finally:
        jax.config.update("jax_platforms", platforms)
    assert open_checkpoint(tmp_path / "orbax", load_spec(model), "auto", 0).format == "orbax"
