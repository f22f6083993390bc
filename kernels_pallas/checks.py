"""What every op asks of its arguments, and how it picks an implementation.

Shapes and dtypes are known while tracing, so these checks cost nothing when a program runs.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Final, Literal, cast

import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.compat import target

type Implementation = Literal["reference", "mosaic_gpu", "triton"]

FLOAT_DTYPES: Final = ("float32", "bfloat16", "float16")


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises ValueError naming the argument, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def require_array(name: str, array: Array, shape: tuple[int | None, ...], *dtypes: str) -> None:
    """Raises ValueError unless the shape fits (None: any size), TypeError for another dtype."""
    fits = array.ndim == len(shape) and all(
        want in (None, size) for want, size in zip(shape, array.shape, strict=True)
    )
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    require(fits, f"{name}.shape", array.shape, f"({wanted})")
    if jnp.dtype(array.dtype).name not in dtypes:
        raise TypeError(f"{name}.dtype is {array.dtype}; allowed: {', '.join(dtypes)}")


def require_pages(k_pages: Array, v_pages: Array) -> None:
    """k_pages and v_pages are [P, K, page_size, H], alike, floating point and not empty."""
    require_array("k_pages", k_pages, (None,) * 4, *FLOAT_DTYPES)
    require(k_pages.size > 0, "k_pages.shape", k_pages.shape, "no dimension of size 0")
    require_array("v_pages", v_pages, k_pages.shape, k_pages.dtype.name)


def require_queries(q: Array, k_pages: Array) -> None:
    """q is [rows, N, H] in the pages' dtype, and N is a multiple of their K."""
    kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    require_array("q", q, (None, None, head_dim), k_pages.dtype.name)
    require(q.size > 0, "q.shape", q.shape, "no dimension of size 0")
    heads = q.shape[1]
    allowed = f"multiples of {kv_heads} kv heads"
    require(heads % kv_heads == 0, "query heads (q.shape[1])", heads, allowed)


def require_rows(page_table: Array, context_lens: Array, num_rows: int | None) -> None:
    """page_table is [rows, pages] and context_lens [rows], both int32 and not empty."""
    require_array("page_table", page_table, (num_rows, None), "int32")
    require(page_table.size > 0, "page_table.shape", page_table.shape, "no dimension of size 0")
    require_array("context_lens", context_lens, page_table.shape[:1], "int32")


def require_slots(slot_mapping: Array, k_pages: Array, num_tokens: int) -> None:
    """slot_mapping is int32 [num_tokens], and int32 can name every slot of the pool."""
    num_slots = k_pages.shape[0] * k_pages.shape[2]
    require(num_slots < 2**31, "slots of k_pages", num_slots, "below 2**31")
    require_array("slot_mapping", slot_mapping, (num_tokens,), "int32")


def require_options(scale: float | None, window: int | None, soft_cap: float | None) -> None:
    """The options that both attention ops share."""
    allowed = "above 0 and finite, or None"
    require(scale is None or 0 < scale < math.inf, "scale", scale, allowed)
    fits = window is None or 1 <= window <= 2**30
    require(fits, "window", window, "1 to 2**30, or None")
    require(soft_cap is None or 0 < soft_cap < math.inf, "soft_cap", soft_cap, allowed)


class UnsupportedError(ValueError):
    """An implementation does not do what the op allows."""


def require_supported(ok: bool, name: str, value: object, allowed: str) -> None:
    """As `require`, but for what only this implementation does not allow."""
    if not ok:
        raise UnsupportedError(f"{name} is {value!r}; allowed: {allowed}")


def choose[F: Callable](table: Mapping[Implementation, F], name: Implementation | None) -> F:
    """The implementation called `name`.

    None is the first that supports the arguments, in order of preference on the device that the
    program is traced for (`compat.target`).
    """
    if name is not None:
        require(name in table, "implementation", name, ", ".join(table))
        return table[name]
    candidates = [table[name] for name in _preferences(target().capability) if name in table]

    def first_supported(*args, **options):
        for function in candidates[:-1]:
            with contextlib.suppress(UnsupportedError):
                return function(*args, **options)
        return candidates[-1](*args, **options)

    return cast(F, first_supported)


def _preferences(capability: int) -> tuple[Implementation, ...]:
    if capability == 0:
        return ("reference",)
    if capability == 90:  # wgmma is of Hopper alone
        return ("mosaic_gpu", "triton", "reference")
    return ("triton", "reference")
