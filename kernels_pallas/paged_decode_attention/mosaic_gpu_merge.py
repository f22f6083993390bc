"""Second pass of decoding on Hopper: each row's attention from its parts."""

import functools
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.compat import pl, plgpu, tiled_smem
from kernels_pallas.paged_decode_attention.mosaic_gpu_softmax import (
    COLUMNS,
    LAYOUT,
    in_columns,
)
from kernels_pallas.powers import LOG2E

REGISTERS: Final = 128
"""Of each thread, for the parts that are loaded together."""

MAX_UNROLL: Final = 16


def merge(
    parts: Int32[Array, "B heads 2"],
    accs: Float32[Array, "parts width columns"],
    lses: Float32[Array, "parts columns"],
    *,
    padded_group: int,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "B heads padded_group width"], Float32[Array, "B heads columns"]]:
    """(out, natural log-sum-exp) of each row and head; (0, -inf) where it has no part.

    Args:
      parts: `Plan.parts`.
      accs: output of each part, head_dim in rows and queries in columns, both padded.
      lses: base-2 log-sum-exp of each part.
    """
    B, num_heads, _ = parts.shape
    _, width, columns = accs.shape
    return plgpu.kernel(
        functools.partial(_body, unroll=min(MAX_UNROLL, REGISTERS * 128 // (width * columns))),
        out_type=(
            jax.ShapeDtypeStruct((B, num_heads, padded_group, width), dtype),
            jax.ShapeDtypeStruct((B, num_heads, columns), jnp.float32),
        ),
        scratch_types=(
            tiled_smem((columns, width), dtype),
            plgpu.SMEM((columns,), jnp.float32),
        ),
        grid=(B, num_heads),
        grid_names=("row", "head"),
        kernel_name="merge_decode_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(parts, accs, lses)


def _body(parts_ref, accs_ref, lses_ref, out_ref, lse_ref, out_tile, lse_tile, *, unroll: int):
    columns, width = out_tile.shape
    row, head = lax.axis_index("row"), lax.axis_index("head")
    first, count = parts_ref[row, head, 0], parts_ref[row, head, 1]
    load: Any = functools.partial(plgpu.load, optimized=False)  # as loads from global memory are

    def add_parts(i, carry):
        acc, total, highest = carry
        indices = [i * unroll + j for j in range(unroll)]
        parts = [first + lax.min(index, count - 1) for index in indices]
        accs = [load(accs_ref.at[part], layout=LAYOUT) for part in parts]
        lses = [load(lses_ref.at[part], layout=COLUMNS) for part in parts]
        absent = [jnp.where(index < count, 0.0, -jnp.inf) for index in indices]
        lses = [lse + bias for lse, bias in zip(lses, absent, strict=True)]
        new_highest = functools.reduce(jnp.maximum, lses, highest)
        keep = jnp.exp2(highest - new_highest)
        acc, total = acc * in_columns(keep, acc.shape), total * keep
        for part_acc, lse in zip(accs, lses, strict=True):
            weight = jnp.exp2(lse - new_highest)
            acc += part_acc * in_columns(weight, acc.shape)
            total += weight
        return acc, total, new_highest

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    acc = plgpu.layout_cast(zeros((width, columns)), LAYOUT)
    total = plgpu.layout_cast(zeros((columns,)), COLUMNS)
    highest = plgpu.layout_cast(jnp.full((columns,), -jnp.inf, jnp.float32), COLUMNS)
    steps = lax.div(count + (unroll - 1), unroll)
    acc, total, highest = lax.fori_loop(0, steps, add_parts, (acc, total, highest))

    seen = total > 0.0
    inverse = jnp.where(seen, 1.0 / total, 0.0)
    out_tile.T[...] = (acc * in_columns(inverse, acc.shape)).astype(out_tile.dtype)
    lse_tile[...] = jnp.where(seen, (highest + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
    plgpu.commit_smem()
    queries = pl.ds(0 * row, columns)  # past their end TMA drops what it copies
    plgpu.copy_smem_to_gmem(out_tile, out_ref.at[row, head, queries])
    plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[row, head])
    plgpu.wait_smem_to_gmem(0)
