"""Published configs are understood; anything else is refused by the name of the field."""

import json
import math

import pytest

from semipd_jax.errors import CheckpointError
from semipd_jax.models.llama_spec import Llama3Rope
from semipd_jax.models.registry import load_spec, parse_spec

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_3_2_1B = {
    **LLAMA_3_1_8B,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], "factor": 32.0},
    "tie_word_embeddings": True,
}
MISTRAL_7B_V0_1 = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MISTRAL_7B_V0_3 = {
    **MISTRAL_7B_V0_1,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {  # config, number of parameters, first layer's window
    "Llama-3.1-8B": (LLAMA_3_1_8B, 8_030_261_248, None),
    "Llama-3.2-1B": (LLAMA_3_2_1B, 1_235_814_400, None),
    "Mistral-7B-v0.1": (MISTRAL_7B_V0_1, 7_241_732_096, 4096),
    "Mistral-7B-v0.3": (MISTRAL_7B_V0_3, 7_248_023_552, None),
    "Qwen2.5-7B": (QWEN2_5_7B, 7_615_616_512, None),
    "Qwen3-0.6B": (QWEN3_0_6B, 596_049_920, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_number_of_parameters(name):
    values, num_parameters, window = PUBLISHED[name]
    spec = parse_spec(values)
    assert sum(math.prod(weight.shape) for weight in spec.weights) == num_parameters
    assert spec.config.windows == (window,) * spec.num_layers
    assert spec.config.head_dim == values.get("head_dim", 128)
    assert spec.checkpoint_dtype == "bfloat16"
    assert spec.max_model_len == values["max_position_embeddings"]
    assert [array.page_shape for array in spec.kv_layout(64)] == [
        (values["num_key_value_heads"], 64, spec.config.head_dim)
    ] * 2


def test_both_spellings_of_rope_and_dtype():
    old = parse_spec(LLAMA_3_1_8B)
    new = {k: v for k, v in LLAMA_3_1_8B.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    new["dtype"] = new.pop("torch_dtype")
    assert parse_spec(new).config == old.config
    assert parse_spec(new).checkpoint_dtype == old.checkpoint_dtype
    assert old.config.rope.theta == 500000.0
    assert old.config.rope.scaling == Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192
    )


def test_yarn_lengthens_the_limit():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert parse_spec({**QWEN2_5_7B, "rope_scaling": scaling}).max_model_len == 131072


def test_absent_window_is_transformers_default():
    values = {k: v for k, v in MISTRAL_7B_V0_1.items() if k != "sliding_window"}
    assert parse_spec(values).config.windows[0] == 4096


def test_qwen_windows_start_at_max_window_layers():
    values = {**QWEN2_5_7B, "num_hidden_layers": 4, "max_window_layers": 2}
    values |= {"use_sliding_window": True, "sliding_window": 8}
    assert parse_spec(values).config.windows == (None, None, 8, 8)
    assert parse_spec({**values, "sliding_window": None}).config.windows == (None,) * 4
    assert parse_spec({**values, "use_sliding_window": False}).config.windows == (None,) * 4


REFUSED = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": "32000",
    "hidden_size": 0,
    "num_hidden_layers": 2**31 - 1,
    "num_attention_heads": True,
    "num_key_value_heads": 5,
    "intermediate_size": 2**40,
    "head_dim": 63,
    "hidden_act": "gelu",
    "rms_norm_eps": float("nan"),
    "max_position_embeddings": None,
    "rope_theta": 0,
    "tie_word_embeddings": "yes",
    "attention_bias": 1,
    "torch_dtype": "int8",
    "partial_rotary_factor": 0.5,
    "auto_map": {"AutoModelForCausalLM": "modeling.Evil"},
    "quantization_config": {"quant_method": "gptq"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_refuses_a_bad_field_by_name(field):
    with pytest.raises(CheckpointError, match=rf"{field.removesuffix('s')}.*(allowed|missing)"):
        parse_spec({**LLAMA_3_1_8B, field: REFUSED[field]})


def test_an_unknown_architecture_lists_what_is_supported():
    with pytest.raises(CheckpointError, match=r"GPT2LM.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        parse_spec({**LLAMA_3_1_8B, "architectures": ["GPT2LMHeadModel"]})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_type": "dynamic"}, "rope_type"),
        ({"rope_type": "longrope"}, "rope_type"),
        ({"factor": None}, "factor"),
        ({"high_freq_factor": 0.5}, "high_freq_factor"),
        ({"original_max_position_embeddings": "8192"}, "original_max_position_embeddings"),
    ],
)
def test_refuses_bad_rope_scaling_by_name(changes, field):
    scaling = {**LLAMA_3_1_8B["rope_scaling"], **changes}
    with pytest.raises(CheckpointError, match=f"rope_scaling: {field}"):
        parse_spec({**LLAMA_3_1_8B, "rope_scaling": scaling})


def test_refuses_layer_types_of_the_wrong_length_or_kind():
    values = {**QWEN2_5_7B, "use_sliding_window": True, "sliding_window": 8}
    for kinds in (["full_attention"], ["chunked_attention"] * 28):
        with pytest.raises(CheckpointError, match="layer_types"):
            parse_spec({**values, "layer_types": kinds})


@pytest.mark.parametrize("text", [None, "", "[1]", "{", "{" * 100_000, '{"architectures": 1}'])
def test_refuses_a_directory_without_a_proper_config(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_spec(tmp_path)


def test_reads_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_0_6B))
    assert load_spec(tmp_path).config == parse_spec(QWEN3_0_6B).config
