"""All that the kernels use of Pallas, which changes often: the only importer of its modules.

Tested with jax 0.11.2 and 0.12.0.1. A Mosaic GPU kernel is made with `plgpu.kernel`, a Triton
kernel with `triton_call`; which backend a plain `pl.pallas_call` gets differs between releases.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton as pltriton
from jax.extend.backend import get_default_device

__all__ = ["Target", "pl", "plgpu", "pltriton", "target", "tiled_smem", "triton_call"]


class Target(NamedTuple):
    """What programs are traced for.

    Attributes:
      capability: CUDA compute capability times ten (90: Hopper); 0 if it is not a GPU.
      num_sms: multiprocessors that the process sees; under an SM share of MPS, its share of them.
    """

    capability: int
    num_sms: int


def target() -> Target:
    """The device of the abstract mesh in use if it has one, else JAX's default device.

    Both are part of the key under which JAX caches traces. A device without hardware, as described
    to a compiler, is set by `jax.default_device` and `jax.sharding.use_abstract_mesh`.
    """
    device: Any = jax.sharding.get_abstract_mesh().abstract_device or get_default_device()
    if device.platform not in ("gpu", "cuda"):
        return Target(0, 0)
    num_sms = device.core_count if hasattr(device, "core_count") else device.num_cores
    return Target(pltriton.get_gpu_info().compute_capability, num_sms)


def tiled_smem(shape: tuple[int, ...], dtype: Any, *, swizzle: int = 128, rows: int = 8) -> Any:
    """Shared memory for an array of 16-bit items, in the layout that TMA writes and wgmma reads.

    Args:
      swizzle: bytes of a row of a tile; its items divide the last dimension.
      rows: rows of a tile, and the step in which TMA copies them; wgmma wants 8.

    Raises:
      ValueError: copies of `rows` rows would not start at multiples of 128 bytes, as TMA wants
        (PTX ISA, cp.async.bulk.tensor). Compilers do not see that.
    """
    step = rows * shape[-1] * jnp.dtype(dtype).itemsize
    if step % 128:
        raise ValueError(f"{rows} rows have {step} bytes; allowed: multiples of 128")
    tiling = plgpu.TilingTransform((rows, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    swizzling = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling))


def set_apart[*Arrays](*arrays: *Arrays) -> tuple[*Arrays]:
    """The arrays, each in a buffer of its own if a program made it.

    A slice of another array would otherwise be read where it lies, and Mosaic refuses operands that
    do not start at a multiple of 256 bytes.
    """
    return jax.lax.optimization_barrier(arrays)


def triton_call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int, **options: Any
) -> Callable[..., Any]:
    """`pl.pallas_call` on the Triton backend; `options` are those of `pl.pallas_call`."""
    # Lowering, which warns that this backend is deprecated, is up to the caller of the caller.
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", category=DeprecationWarning
    )
    params = pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, compiler_params=params, **options)
