"""Norms, rotary embedding and writing KV in plain JAX."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.kv_write.reference import kv_write


def rope_kv_write(
    qkv: Float[Array, "T NKK H"],
    cos: Float32[Array, "T half"],
    sin: Float32[Array, "T half"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    slot_mapping: Int32[Array, " T"],
    q_norm: Float[Array, " H"] | None,
    k_norm: Float[Array, " H"] | None,
    *,
    eps: float,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """See `kernels_pallas.rope_kv_write.rope_kv_write`."""
    K = k_pages.shape[1]
    q, k, v = jnp.split(qkv, [qkv.shape[1] - 2 * K, qkv.shape[1] - K], axis=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    cos, sin = cos[:, None, :], sin[:, None, :]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, *kv_write(k_pages, v_pages, k, v, slot_mapping)


def rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*rows D"]:
    """x over the root of its mean square in the last dimension, times weight; in float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight.astype(jnp.float32), range(x.ndim - 1))
    return (wide * scale * weight).astype(x.dtype)


def rotate(
    x: Float[Array, "T heads H"],
    cos: Float32[Array, "T 1 half"],
    sin: Float32[Array, "T 1 half"],
) -> Float[Array, "T heads H"]:
    """Turns every head to its position, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
