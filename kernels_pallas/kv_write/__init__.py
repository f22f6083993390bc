"""Writing new tokens' keys and values into their pages."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from jaxtyping import Array, Float, Int32

from kernels_pallas.checks import (
    Implementation,
    choose,
    require_array,
    require_pages,
    require_slots,
)
from kernels_pallas.kv_write import reference

IMPLEMENTATIONS: Final[Mapping[Implementation, Callable]] = MappingProxyType(
    {"reference": reference.kv_write}
)


def kv_write(
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    slot_mapping: Int32[Array, " T"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Puts token t into slot `slot_mapping[t]` of both pools, and touches no other slot.

    Inside a jitted function that donates the pools, the result lives where they lived and no
    temporary of their size is made.

    Args:
      k_pages, v_pages: float32, bfloat16 or float16.
      k, v: new keys and values, in the pools' dtype.
      slot_mapping: page_id * page_size + offset of each token; a token with a negative slot is
        dropped. Slots must be distinct and below P * page_size.
      implementation: a name in IMPLEMENTATIONS; None picks one.

    Returns:
      The updated (k_pages, v_pages).

    Raises:
      ValueError, TypeError: an argument has a shape or dtype that is not allowed; names it.
    """
    require_pages(k_pages, v_pages)
    _, kv_heads, _, head_dim = k_pages.shape
    require_array("k", k, (None, kv_heads, head_dim), k_pages.dtype.name)
    require_array("v", v, k.shape, k_pages.dtype.name)
    require_slots(slot_mapping, k_pages, k.shape[0])
    return choose(IMPLEMENTATIONS, implementation)(k_pages, v_pages, k, v, slot_mapping)
