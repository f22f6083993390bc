"""What the device reaches in this run: the yardsticks of all shares."""

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.kernel_bench.chains import chained
from benchmarks.kernel_bench.timing import time_in_turns

_COPY_BYTES = 2**30
_MATMUL_SIZE = 8192

L2_BYTES = 64 * 2**20
"""No less than the L2 cache of the GPUs that the kernels are for (A100 40 MiB, H100 50 MiB)."""


def measure() -> tuple[float, float]:
    """(bytes per second of a copy, read and written; FLOP per second of a bfloat16 matmul)."""
    ones = jnp.ones(_COPY_BYTES // 4, jnp.float32)
    # Random: equal numbers draw less power, and a GPU multiplies them faster. Products stay small.
    shape = (_MATMUL_SIZE, _MATMUL_SIZE)
    matrix = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) * _MATMUL_SIZE**-0.5
    times = time_in_turns(
        {
            # XLA does not fuse across the barrier, so each negation reads and writes it all.
            "copy": chained(lambda x: lax.optimization_barrier(-x), ones, [()], 4),
            "matmul": chained(jnp.matmul, matrix, [(matrix,)], 4),
        }
    )
    copy_rate = 2 * _COPY_BYTES / times["copy"].median_s
    return copy_rate, 2 * _MATMUL_SIZE**3 / times["matmul"].median_s
