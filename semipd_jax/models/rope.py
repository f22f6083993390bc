"""Rotary position embedding: which frequencies a config.json asks for, and turning heads by them.

Half of the head dimension pairs with the other half ("rotate_half" of Hugging Face), not
neighbours with neighbours.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from semipd_jax.models.llama_spec import Llama3Rope, RopeConfig, YarnRope


def frequencies(config: RopeConfig, head_dim: int) -> Float32[np.ndarray, " half"]:
    """Radians per token of each pair of channels, scaled as the config says."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    base = config.theta**-exponents
    match config.scaling:
        case float(factor):
            base = base / factor
        case Llama3Rope():
            base = _llama3(base, config.scaling)
        case YarnRope():
            base = _yarn(base, config.theta, config.scaling)
    return base.astype(np.float32)


def tables(
    config: RopeConfig, head_dim: int, positions: Int32[Array, " T"]
) -> tuple[Float32[Array, "T 1 half"], Float32[Array, "T 1 half"]]:
    """Cosine and sine of every pair's angle, for `rotate`."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies(config, head_dim)[None, :]
    scale = config.scaling.attention_factor if isinstance(config.scaling, YarnRope) else 1.0
    return (jnp.cos(angles) * scale)[:, None, :], (jnp.sin(angles) * scale)[:, None, :]


def rotate(
    x: Float[Array, "T heads H"],
    cos: Float32[Array, "T 1 half"],
    sin: Float32[Array, "T 1 half"],
) -> Float[Array, "T heads H"]:
    """Turns every head to its position, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _llama3(base: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    """Llama 3.1: slow pairs are slowed by `factor`, fast ones kept, a linear blend in between."""
    turns = scaling.original_max_len * base / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * (kept + (1.0 - kept) / scaling.factor)


def _yarn(base: np.ndarray, theta: float, scaling: YarnRope) -> np.ndarray:
    """YaRN (arXiv 2309.00071): the blend is linear in the index of the pair."""
    half = len(base)

    def pair_of(num_turns: float) -> float:
        wavelength = scaling.original_max_len / (num_turns * 2 * math.pi)
        return half * math.log(wavelength) / math.log(theta)

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0.0, 1.0)
    return base * ((1.0 - ramp) + ramp / scaling.factor)
