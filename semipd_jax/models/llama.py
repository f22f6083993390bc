"""The Llama family as one flax module: Llama, Mistral, Qwen2, Qwen3.

A forward pass is pure: it works on a flat axis of T tokens of any number of requests, and the KV
cache goes in and comes out. How queries find their keys is the caller's (`Attend`), so the same
module serves prefill and decode, paged or not.

Numbers: activations and weights have the module's dtype, matrix products accumulate in float32,
norms, rotary embedding and the activation function are computed in float32, logits are float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from semipd_jax.models import rope
from semipd_jax.models.llama_spec import LlamaConfig

type LayerCache = dict[str, Array]
"""One layer's KV arrays by name (`models.spec.KVArray`)."""

type Attend = Callable[
    [
        Float[Array, "T N H"],
        Float[Array, "T K H"],
        Float[Array, "T K H"],
        LayerCache,
        int | None,
    ],
    tuple[Float[Array, "T N H"], LayerCache],
]
"""(queries, keys, values, this layer's cache, window) → (attention output, updated cache).

Scores are scaled by H ** -0.5. With a window w a token sees itself and the w - 1 tokens before it.
"""


class Llama(nnx.Module):
    """A decoder with its output head. Parameter paths are those of `llama_spec.weights`."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = _matrix(config.vocab_size, config.hidden_size, dtype, rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)]
        )
        self.norm = _ones(config.hidden_size, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _matrix(config.vocab_size, config.hidden_size, dtype, rngs)

    def __call__(
        self,
        token_ids: Int32[Array, " T"],
        positions: Int32[Array, " T"],
        caches: list[LayerCache],
        attend: Attend,
    ) -> tuple[Float[Array, "T D"], list[LayerCache]]:
        """Returns the hidden states after the final norm, and each layer's updated cache."""
        cos_sin = rope.tables(self.config.rope, self.config.head_dim, positions)
        x = jnp.take(self.embed_tokens[...], token_ids, axis=0, mode="clip")
        updated = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cos_sin, cache, attend)
            updated.append(cache)
        return _rms_norm(x, self.norm[...], self.config.rms_norm_eps), updated

    def logits(self, hidden: Float[Array, "R D"]) -> Float32[Array, "R V"]:
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return _project(hidden, head[...], out_dtype=jnp.float32)


class DecoderLayer(nnx.Module):
    def __init__(
        self, config: LlamaConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.eps = config.rms_norm_eps
        self.attention_norm = _ones(config.hidden_size, dtype)
        self.attention = Attention(config, config.windows[index], dtype=dtype, rngs=rngs)
        self.mlp_norm = _ones(config.hidden_size, dtype)
        self.mlp = GatedMlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "T D"],
        cos_sin: tuple[Float32[Array, "T 1 half"], Float32[Array, "T 1 half"]],
        cache: LayerCache,
        attend: Attend,
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        normed = _rms_norm(x, self.attention_norm[...], self.eps)
        attended, cache = self.attention(normed, cos_sin, cache, attend)
        x = x + attended
        return x + self.mlp(_rms_norm(x, self.mlp_norm[...], self.eps)), cache


class Attention(nnx.Module):
    """Grouped-query attention; queries, keys and values come from one product."""

    def __init__(
        self, config: LlamaConfig, window: int | None, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.window = window
        num_query, num_fused = config.num_heads, config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = _matrix(num_fused * config.head_dim, config.hidden_size, dtype, rngs)
        self.o_proj = _matrix(config.hidden_size, num_query * config.head_dim, dtype, rngs)
        self.qkv_bias = _zeros(num_fused * config.head_dim, dtype) if config.qkv_bias else None
        self.o_bias = _zeros(config.hidden_size, dtype) if config.o_bias else None
        self.q_norm = _ones(config.head_dim, dtype) if config.qk_norm else None
        self.k_norm = _ones(config.head_dim, dtype) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "T D"],
        cos_sin: tuple[Float32[Array, "T 1 half"], Float32[Array, "T 1 half"]],
        cache: LayerCache,
        attend: Attend,
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = _project(x, self.qkv_proj[...], self.qkv_bias).reshape(-1, N + 2 * K, H)
        q, k, v = jnp.split(heads, [N, N + K], axis=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = _rms_norm(q, self.q_norm[...], self.config.rms_norm_eps)
            k = _rms_norm(k, self.k_norm[...], self.config.rms_norm_eps)
        q, k = rope.rotate(q, *cos_sin), rope.rotate(k, *cos_sin)
        attended, cache = attend(q, k, v, cache, self.window)
        return _project(attended.reshape(-1, N * H), self.o_proj[...], self.o_bias), cache


class GatedMlp(nnx.Module):
    """SwiGLU; gate and up come from one product."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up_proj = _matrix(2 * F, D, dtype, rngs)
        self.down_proj = _matrix(D, F, dtype, rngs)
        self.gate_up_bias = _zeros(2 * F, dtype) if config.mlp_bias else None
        self.down_bias = _zeros(D, dtype) if config.mlp_bias else None

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        gate_up = _project(x, self.gate_up_proj[...], self.gate_up_bias).astype(jnp.float32)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
        return _project(hidden, self.down_proj[...], self.down_bias)


def _project(
    x: Float[Array, "T D"],
    weight: Float[Array, "E D"],
    bias: nnx.Param[Array] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "T E"]:
    """x · weightᵀ + bias, accumulated in float32. float32 operands are not rounded to TF32."""
    exact = x.dtype == jnp.float32
    y = lax.dot_general(
        x,
        weight,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        y = y + bias[...].astype(jnp.float32)[None, :]
    return y.astype(out_dtype or x.dtype)


def _rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*rows D"]:
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight.astype(jnp.float32), range(x.ndim - 1))
    return (wide * scale * weight).astype(x.dtype)


def _matrix(rows: int, columns: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param[Array]:
    return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (rows, columns), dtype))


def _ones(size: int, dtype: DTypeLike) -> nnx.Param[Array]:
    return nnx.Param(jnp.ones((size,), dtype))


def _zeros(size: int, dtype: DTypeLike) -> nnx.Param[Array]:
    return nnx.Param(jnp.zeros((size,), dtype))
