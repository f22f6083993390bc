"""Copying a weight piece by piece with a change of dtype, and comparing lists of names."""

from collections.abc import Iterator, Set
from typing import Final

import numpy as np

from semipd_jax.errors import CheckpointError

_BLOCK_BYTES: Final = 16 * 2**20
_MAX_NAMES: Final = 5


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Covers axis 0 with ranges of rows of at most a block's bytes (but at least one row)."""
    row_bytes = max(itemsize, itemsize * int(np.prod(shape[1:])))
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def copy_cast(block: np.ndarray, out: np.ndarray, name: str) -> None:
    """Rounds `block` into `out`. Raises CheckpointError if a value overflows float16."""
    if out.dtype == np.float16 and block.dtype != np.float16:
        try:
            with np.errstate(over="raise"):
                out[...] = block.astype(np.float32)
        except FloatingPointError:
            raise CheckpointError(
                f"{name} has values beyond float16; use dtype bfloat16 or float32"
            ) from None
    else:
        out[...] = block


def check_names(where: str, expected: Set[str], present: Set[str]) -> None:
    """Raises CheckpointError that lists what is missing, or what should not be there."""
    for problem, names in (("lacks", expected - present), ("has unexpected", present - expected)):
        if names:
            listed = ", ".join(sorted(names)[:_MAX_NAMES])
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            raise CheckpointError(f"{where} {problem} {len(names)} tensor(s): {listed}{more}")


def check_tensor(where: str, shape: tuple[int, ...], dtype: str, expected: tuple[int, ...]) -> None:
    """Raises CheckpointError unless the shape is `expected` and the dtype one we can convert."""
    if shape != expected:
        raise CheckpointError(f"{where} has shape {shape}; config.json implies {expected}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"{where} has dtype {dtype}; allowed: float32, bfloat16, float16")
