"""The weight table and the flax module agree; parameter trees and paths are inverses."""

import jax.numpy as jnp
import pytest

from semipd_jax.models.module import abstract_params, flatten, nest
from semipd_jax.models.registry import parse_spec

BASE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
        {"architectures": ["MistralForCausalLM"], "tie_word_embeddings": True},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
    ],
)
def test_weights_agree_with_the_module_in_path_and_shape(values):
    spec = parse_spec({**BASE, **values})
    _, params = abstract_params(spec, jnp.bfloat16)
    leaves = flatten(params)
    assert {w.path: w.shape for w in spec.weights} == {p: x.shape for p, x in leaves.items()}
    assert {x.dtype for x in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
    assert len({w.path for w in spec.weights}) == len(spec.weights)


def test_fused_shapes_are_the_sum_of_their_sources():
    for weight in parse_spec({**BASE, "architectures": ["Qwen2ForCausalLM"]}).weights:
        assert weight.shape[0] == sum(shape[0] for shape in weight.source_shapes)
        assert all(shape[1:] == weight.shape[1:] for shape in weight.source_shapes)


def test_nest_and_flatten_are_inverses():
    leaves = {"norm": 1, "layers/2/mlp/up": 2, "layers/10/mlp/up": 3}
    assert nest(leaves) == {"norm": 1, "layers": {2: {"mlp": {"up": 2}}, 10: {"mlp": {"up": 3}}}}
    assert flatten(nest(leaves)) == leaves
