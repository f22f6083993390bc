"""Random numbers that are a function of a request's seed and a token's position, nothing else.

So a token does not depend on what else is in the batch, on the row, the bucket or the process, and
a step that is run again draws the same.
"""

from typing import Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

_ROTATIONS: Final = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY: Final = np.uint32(0x1BD11BDA)


def uniform_pair(
    seed: UInt32[Array, " B"], position: Int32[Array, " B"]
) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
    """Two independent uniform numbers in [0, 1) for each row, multiples of 2**-24."""
    first, second = _threefry_2x32(seed, position.astype(jnp.uint32))
    return _to_unit(first), _to_unit(second)


def _to_unit(bits: UInt32[Array, " B"]) -> Float32[Array, " B"]:
    return (bits >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)


def _threefry_2x32(
    key: UInt32[Array, " B"], count: UInt32[Array, " B"]
) -> tuple[UInt32[Array, " B"], UInt32[Array, " B"]]:
    """Threefry-2x32 with 20 rounds of the counter (count, 0) under the key (key, 0).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. One evaluation gives the
    two words that a token needs; `jax.random` takes three, and 250 ms of compile time per program.
    """
    keys = key, jnp.zeros_like(key), key ^ _PARITY
    x, y = count + keys[0], keys[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = y ^ x
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x, y
