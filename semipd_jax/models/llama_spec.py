"""What Llama, Mistral, Qwen2 and Qwen3 checkpoints say: sizes, weight names, KV layout. No jax.

Defaults for absent fields are those of Hugging Face transformers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from semipd_jax.models.fields import Fields
from semipd_jax.models.spec import KVArray, ModelFamily, ModelSpec, WeightSpec

_DTYPES: Final = ("float32", "bfloat16", "float16")
_MAX_LAYERS: Final = 4096
_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's scaling of low frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """YaRN (arXiv 2309.00071). `attention_factor` multiplies cosine and sine."""

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding with base `theta`. A float `scaling` divides all frequencies by it."""

    theta: float
    scaling: float | Llama3Rope | YarnRope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of one model.

    Attributes:
      windows: for each layer how many tokens a token sees, itself included; None is all.
      qkv_bias, o_bias, mlp_bias: whether these projections add a bias.
      qk_norm: RMS norm of each query and key head before the rotary embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def weights(config: LlamaConfig) -> Iterator[WeightSpec]:
    """Every parameter of the module: where it goes and what it is made of."""
    D, V = config.hidden_size, config.vocab_size
    yield _weight("embed_tokens", (V, D), "model.embed_tokens.weight")
    for i in range(config.num_layers):
        path, name = f"layers/{i}", f"model.layers.{i}"
        yield _weight(f"{path}/attention_norm", (D,), f"{name}.input_layernorm.weight")
        yield from _attention_weights(config, f"{path}/attention", f"{name}.self_attn")
        yield _weight(f"{path}/mlp_norm", (D,), f"{name}.post_attention_layernorm.weight")
        yield from _mlp_weights(config, f"{path}/mlp", f"{name}.mlp")
    yield _weight("norm", (D,), "model.norm.weight")
    if not config.tie_word_embeddings:
        yield _weight("lm_head", (V, D), "lm_head.weight")


def kv_layout(config: LlamaConfig, page_size: int) -> tuple[KVArray, ...]:
    page_shape = (config.num_kv_heads, page_size, config.head_dim)
    return (KVArray("k_pages", page_shape), KVArray("v_pages", page_shape))


def _attention_weights(config: LlamaConfig, path: str, name: str) -> Iterator[WeightSpec]:
    D, H = config.hidden_size, config.head_dim
    rows = {"q": config.num_heads * H, "k": config.num_kv_heads * H, "v": config.num_kv_heads * H}
    yield _fused(f"{path}/qkv_proj", {f"{name}.{p}_proj.weight": (n, D) for p, n in rows.items()})
    if config.qkv_bias:
        yield _fused(f"{path}/qkv_bias", {f"{name}.{p}_proj.bias": (n,) for p, n in rows.items()})
    yield _weight(f"{path}/o_proj", (D, config.num_heads * H), f"{name}.o_proj.weight")
    if config.o_bias:
        yield _weight(f"{path}/o_bias", (D,), f"{name}.o_proj.bias")
    if config.qk_norm:
        yield _weight(f"{path}/q_norm", (H,), f"{name}.q_norm.weight")
        yield _weight(f"{path}/k_norm", (H,), f"{name}.k_norm.weight")


def _mlp_weights(config: LlamaConfig, path: str, name: str) -> Iterator[WeightSpec]:
    D, F = config.hidden_size, config.intermediate_size
    halves = ("gate", "up")
    yield _fused(f"{path}/gate_up_proj", {f"{name}.{p}_proj.weight": (F, D) for p in halves})
    if config.mlp_bias:
        yield _fused(f"{path}/gate_up_bias", {f"{name}.{p}_proj.bias": (F,) for p in halves})
    yield _weight(f"{path}/down_proj", (D, F), f"{name}.down_proj.weight")
    if config.mlp_bias:
        yield _weight(f"{path}/down_bias", (D,), f"{name}.down_proj.bias")


def _weight(path: str, shape: tuple[int, ...], source: str) -> WeightSpec:
    return WeightSpec(path, shape, (source,), (shape,))


def _fused(path: str, sources: Mapping[str, tuple[int, ...]]) -> WeightSpec:
    shapes = tuple(sources.values())
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return WeightSpec(path, shape, tuple(sources), shapes)


# ---------------------------------------------------------------- config.json


def parse_llama(values: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(values, "config.json")
    num_heads = fields.integer("num_attention_heads")
    bias = fields.flag("attention_bias", False)
    return _parse(
        fields,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def parse_mistral(values: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(values, "config.json")
    return _parse(fields, windows=(_window(fields),) * _num_layers(fields))


def parse_qwen2(values: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(values, "config.json")
    return _parse(fields, windows=_layer_windows(fields), qkv_bias=True)


def parse_qwen3(values: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(values, "config.json")
    bias = fields.flag("attention_bias", False)
    return _parse(
        fields,
        head_dim=fields.integer("head_dim", 128),
        windows=_layer_windows(fields),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


def _parse(
    fields: Fields,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    windows: tuple[int | None, ...] | None = None,
    **switches: bool,
) -> ModelSpec:
    """What the architectures have in common."""
    fields.require(fields.text("hidden_act", "silu") == "silu", "hidden_act", '"silu"')
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = num_kv_heads or fields.integer("num_key_value_heads")
    fields.require(
        num_heads % num_kv_heads == 0,
        "num_key_value_heads",
        f"divisors of num_attention_heads ({num_heads})",
    )
    num_layers = _num_layers(fields)
    config = LlamaConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or _head_dim(fields, num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        windows=windows or (None,) * num_layers,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        **switches,
    )
    fields.require(config.head_dim % 2 == 0, "head_dim", "even numbers")
    return ModelSpec(
        architecture=fields.texts("architectures")[0],
        config=config,
        checkpoint_dtype=_dtype(fields),
        vocab_size=config.vocab_size,
        num_layers=num_layers,
        max_model_len=_max_len(fields, config.rope),
        weights=tuple(weights(config)),
        kv_layout=partial(kv_layout, config),
    )


def _num_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", maximum=_MAX_LAYERS)


def _head_dim(fields: Fields, num_heads: int) -> int:
    if fields.has("head_dim"):
        return fields.integer("head_dim")
    hidden_size = fields.integer("hidden_size")
    fields.require(
        hidden_size % num_heads == 0,
        "hidden_size",
        f"multiples of num_attention_heads ({num_heads}), unless head_dim is given",
    )
    return hidden_size // num_heads


def _window(fields: Fields) -> int | None:
    """A null turns windows off, unlike absence."""
    if "sliding_window" in fields and not fields.has("sliding_window"):
        return None
    return fields.integer("sliding_window", 4096)


def _layer_windows(fields: Fields) -> tuple[int | None, ...]:
    """Qwen: `use_sliding_window` turns windows on from layer `max_window_layers` upwards, or for
    the layers that `layer_types` names."""
    num_layers = _num_layers(fields)
    if not fields.flag("use_sliding_window", False):
        return (None,) * num_layers
    window = _window(fields)
    first = fields.integer("max_window_layers", 28, minimum=0)
    kinds = fields.texts(
        "layer_types",
        ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)],
    )
    fields.require(
        len(kinds) == num_layers and {*kinds} <= {"full_attention", "sliding_attention"},
        "layer_types",
        f'{num_layers} times "full_attention" or "sliding_attention"',
    )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(fields: Fields) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    nested = fields.section("rope_scaling" if fields.has("rope_scaling") else "rope_parameters")
    theta = nested.number("rope_theta", fields.number("rope_theta", 10_000.0))
    for section in (fields, nested):
        section.require(
            section.number("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor", "1"
        )
    key = "rope_type" if nested.has("rope_type") else "type"
    kind = nested.text(key, "default")
    nested.require(kind in _ROPE_TYPES, key, ", ".join(_ROPE_TYPES))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling=nested.number("factor"))
    original_max_len = nested.integer(
        "original_max_position_embeddings", fields.integer("max_position_embeddings")
    )
    if kind == "llama3":
        return RopeConfig(theta=theta, scaling=_llama3_rope(nested, original_max_len))
    nested.require(theta > 1.0, "rope_theta", "above 1")
    return RopeConfig(theta=theta, scaling=_yarn_rope(nested, original_max_len))


def _llama3_rope(nested: Fields, original_max_len: int) -> Llama3Rope:
    low, high = nested.number("low_freq_factor"), nested.number("high_freq_factor")
    nested.require(high > low, "high_freq_factor", f"above low_freq_factor ({low:g})")
    return Llama3Rope(
        factor=nested.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_len=original_max_len,
    )


def _yarn_rope(nested: Fields, original_max_len: int) -> YarnRope:
    factor = nested.number("factor")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0

    attention_factor = magnitude(1.0)
    if nested.has("mscale") and nested.has("mscale_all_dim"):
        attention_factor = magnitude(nested.number("mscale")) / magnitude(
            nested.number("mscale_all_dim")
        )
    fast, slow = nested.number("beta_fast", 32.0), nested.number("beta_slow", 1.0)
    nested.require(fast >= slow, "beta_fast", f"at least beta_slow ({slow:g})")
    return YarnRope(
        factor=factor,
        attention_factor=nested.number("attention_factor", attention_factor),
        beta_fast=fast,
        beta_slow=slow,
        truncate=nested.flag("truncate", True),
        original_max_len=original_max_len,
    )


def _max_len(fields: Fields, rope: RopeConfig) -> int:
    """YaRN is switched on by adding it to a config.json whose own limit stays as it was."""
    limit = fields.integer("max_position_embeddings")
    if isinstance(rope.scaling, YarnRope):
        return max(limit, int(rope.scaling.original_max_len * rope.scaling.factor))
    return limit


def _dtype(fields: Fields) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (before)."""
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    dtype = fields.text(key, "float32").removeprefix("torch.")
    fields.require(dtype in _DTYPES, key, ", ".join(_DTYPES))
    return dtype


_MODULE: Final = "semipd_jax.models.llama:Llama"
FAMILIES: Final = (
    ModelFamily(("LlamaForCausalLM",), parse_llama, _MODULE),
    ModelFamily(("MistralForCausalLM",), parse_mistral, _MODULE),
    ModelFamily(("Qwen2ForCausalLM",), parse_qwen2, _MODULE),
    ModelFamily(("Qwen3ForCausalLM",), parse_qwen3, _MODULE),
)
