"""From the product of the qkv projection to attention: norms, rotary embedding, writing KV.

One pass: every head is read once and written once, queries to their result, keys and values to
their slots. XLA makes three kernels of it, and more if there are norms.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.checks import (
    Implementation,
    choose,
    require,
    require_array,
    require_pages,
    require_slots,
)
from kernels_pallas.rope_kv_write import reference, triton

IMPLEMENTATIONS: Final[Mapping[Implementation, Callable]] = MappingProxyType(
    {"reference": reference.rope_kv_write, "triton": triton.rope_kv_write}
)


def rope_kv_write(
    qkv: Float[Array, "T NKK H"],
    cos: Float32[Array, "T half"],
    sin: Float32[Array, "T half"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    slot_mapping: Int32[Array, " T"],
    q_norm: Float[Array, " H"] | None = None,
    k_norm: Float[Array, " H"] | None = None,
    *,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Turns queries and keys to their positions, and puts keys and values into their slots.

    As `kv_write` of the turned keys and the values, which are the last 2 K heads of `qkv`. Turning
    pairs item i of a head with item i + H / 2 ("rotate_half") and is done in float32.

    Args:
      qkv: N query heads, K key heads and K value heads of each token, in the pools' dtype.
      cos, sin: of each token's angle for each pair, of width H / 2.
      k_pages, v_pages: float32, bfloat16 or float16.
      slot_mapping: page_id * page_size + offset of each token; the keys and values of a token with
        a negative slot are dropped. Slots must be distinct and below P * page_size.
      q_norm, k_norm: weights of an RMS norm of every query or key head before it is turned,
        rounded to its dtype; None is no norm. Both or neither.
      eps: of the norms.
      implementation: a name in IMPLEMENTATIONS; None picks one for the device (`checks.choose`).

    Returns:
      (turned queries, updated k_pages, updated v_pages).

    Raises:
      ValueError, TypeError: an argument has a shape or dtype that is not allowed; names it.
    """
    require_pages(k_pages, v_pages)
    _, kv_heads, _, head_dim = k_pages.shape
    dtype = k_pages.dtype.name
    require(head_dim % 2 == 0, "head_dim (k_pages.shape[3])", head_dim, "even numbers")
    require_array("qkv", qkv, (None, None, head_dim), dtype)
    require(qkv.size > 0, "qkv.shape", qkv.shape, "no dimension of size 0")
    heads = qkv.shape[1]
    fits = heads > 2 * kv_heads and heads % kv_heads == 0
    require(fits, "heads (qkv.shape[1])", heads, f"multiples of {kv_heads} above {2 * kv_heads}")
    for name, array in (("cos", cos), ("sin", sin)):
        require_array(name, array, (qkv.shape[0], head_dim // 2), "float32")
    require_slots(slot_mapping, k_pages, qkv.shape[0])
    both = (q_norm is None) == (k_norm is None)
    require(both, "k_norm", k_norm, "None if q_norm is None, else weights")
    for name, array in (("q_norm", q_norm), ("k_norm", k_norm)):
        if array is not None:
            require_array(name, array, (head_dim,), dtype)
    require(eps > 0, "eps", eps, "above 0")
    return choose(IMPLEMENTATIONS, implementation)(
        qkv, cos, sin, k_pages, v_pages, slot_mapping, q_norm, k_norm, eps=eps
    )
