"""The flax module against Hugging Face transformers on the same checkpoint, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import load_reference, write_checkpoint

from semipd_jax.models.checkpoint import open_checkpoint
from semipd_jax.models.module import abstract_params, merge, nest
from semipd_jax.models.registry import load_spec
from semipd_jax.storage.manifest import numpy_dtype

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama multi-head, tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama multi-query, biases": (
        "llama",
        {"num_key_value_heads": 1, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    ),
    "llama 3.1 rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    "llama linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}},
    ),
    "llama yarn": ("llama", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "mistral window": ("mistral", {"sliding_window": 7, "head_dim": 24}),
    "mistral no window": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "num_attention_heads": 8}),
    "qwen2 windows above": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 64, "num_key_value_heads": 1}),
    "qwen3 listed windows, bias": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3 sharded bfloat16": (
        "qwen3",
        {"head_dim": 24, "dtype": "bfloat16", "max_shard_size": "40KB"},
    ),
    "mistral float16": ("mistral", {"dtype": "float16", "tie_word_embeddings": True}),
}


def dense_attend(q, k, v, cache, window):
    """Causal attention among the T tokens themselves; the cache passes through."""
    q_pos, k_pos = jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None, :]
    visible = k_pos <= q_pos
    if window is not None:
        visible &= k_pos > q_pos - window
    groups = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
    scores = jnp.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("nts,snh->tnh", weights, v), cache


def load(directory, dtype="float32"):
    spec = load_spec(directory)
    checkpoint = open_checkpoint(directory, spec, "auto", seed=0)
    leaves = {}
    for weight in spec.weights:
        leaves[weight.path] = np.empty(weight.shape, numpy_dtype(dtype))
        checkpoint.read(weight, leaves[weight.path])
    return spec, jax.tree.map(jnp.asarray, nest(leaves))


def forward(spec, params, token_ids, dtype=jnp.float32):
    graphdef, _ = abstract_params(spec, dtype)

    @jax.jit
    def run(params, token_ids):
        model = merge(graphdef, params)
        positions = jnp.arange(len(token_ids), dtype=jnp.int32)
        hidden, _ = model(token_ids, positions, [{}] * spec.num_layers, dense_attend)
        return hidden, model.logits(hidden)

    return run(params, jnp.asarray(token_ids, jnp.int32))


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_equal_transformers(case, tmp_path):
    family, options = CASES[case]
    directory = write_checkpoint(tmp_path / "model", family, **options)
    token_ids = np.random.default_rng(1).integers(0, 256, 50)

    spec, params = load(directory)
    _, logits = forward(spec, params, token_ids)
    with torch.no_grad():
        expected = load_reference(directory)(torch.tensor(token_ids)[None]).logits[0]

    assert logits.dtype == jnp.float32
    assert float(expected.std()) > 0.5  # not a model that says nothing
    ours = jax.nn.log_softmax(logits, axis=-1)
    theirs = torch.log_softmax(expected, dim=-1).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_bfloat16_module_keeps_its_dtype_and_stays_near_float32(tmp_path):
    directory = write_checkpoint(tmp_path / "model", "qwen3", head_dim=16, attention_bias=True)
    token_ids = np.arange(40)
    _, exact = forward(*load(directory), token_ids)
    hidden, logits = forward(*load(directory, "bfloat16"), token_ids, jnp.bfloat16)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert float(jnp.abs(logits - exact).mean()) < 0.05 * float(exact.std())


def test_caches_go_through_in_layer_order_with_each_layer_s_window(tmp_path):
    directory = write_checkpoint(
        tmp_path / "model",
        "qwen2",
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    )
    spec, params = load(directory)
    seen = []

    def attend(q, k, v, cache, window):
        seen.append((int(cache["layer"][0]), window))
        return q, {"layer": cache["layer"] + 10}

    graphdef, _ = abstract_params(spec, jnp.float32)
    caches = [{"layer": jnp.array([i])} for i in range(3)]
    tokens = jnp.arange(4, dtype=jnp.int32)
    _, updated = merge(graphdef, params)(tokens, tokens, caches, attend)
    assert seen == [(0, None), (1, None), (2, 5)]
    assert [int(cache["layer"][0]) for cache in updated] == [10, 11, 12]
