"""Frequencies against transformers at the sizes of published models; angles at long positions."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from semipd_jax.models import rope
from semipd_jax.models.llama_spec import RopeConfig, YarnRope
from semipd_jax.models.registry import parse_spec

LLAMA_3_1 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn"}


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA_3_1,
        QWEN_YARN,
        {**QWEN_YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**QWEN_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        {**QWEN_YARN, "attention_factor": 1.5},
        {"type": "linear", "factor": 4},
    ],
)
def test_frequencies_equal_transformers(scaling):
    values = {
        "vocab_size": 128,
        "hidden_size": 4096,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
    }
    reference = transformers.LlamaConfig(**values)
    kind = scaling.get("rope_type") or scaling["type"]
    expected, attention_factor = ROPE_INIT_FUNCTIONS[kind](reference, "cpu")

    config = parse_spec({**values, "architectures": ["LlamaForCausalLM"]}).config
    np.testing.assert_allclose(rope.frequencies(config.rope, 128), expected.numpy(), rtol=2e-6)
    if isinstance(config.rope.scaling, YarnRope):
        assert config.rope.scaling.attention_factor == pytest.approx(attention_factor)


def test_angles_stay_accurate_at_long_positions():
    config, positions = RopeConfig(theta=500_000.0), np.array([0, 1, 8191, 131_071])
    cos, sin = rope.tables(config, 64, jnp.asarray(positions, jnp.int32))
    angles = positions[:, None] * 500_000.0 ** -(np.arange(0, 64, 2) / 64)
    worst = 131_072 * 2**-23  # float32 holds an angle of this size no better
    np.testing.assert_allclose(cos[:, 0], np.cos(angles), atol=worst, rtol=0)
    np.testing.assert_allclose(sin[:, 0], np.sin(angles), atol=worst, rtol=0)


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 32)), jnp.float32) for _ in range(2))

    def score(q_position, k_position):
        turned = [
            rope.rotate(x, *rope.tables(RopeConfig(theta=100.0), 32, jnp.array([p], jnp.int32)))
            for x, p in ((q, q_position), (k, k_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)
