"""Attention over a whole context from attention over its parts.

Partial results over disjoint sets of keys combine exactly through their log-sum-exp: the way
split-KV decoding and shared prefixes ("cascade", FlashInfer, arXiv 2501.01005 §2.2) are put
together.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from jaxtyping import Array, Float, Float32

from kernels_pallas.checks import FLOAT_DTYPES, Implementation, choose, require, require_array
from kernels_pallas.merge_attention import reference

IMPLEMENTATIONS: Final[Mapping[Implementation, Callable]] = MappingProxyType(
    {"reference": reference.merge_attention}
)


def merge_attention(
    outs: Float[Array, "S *rows N H"],
    lses: Float32[Array, "S *rows N"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*rows N H"], Float32[Array, "*rows N"]]:
    """Merges attention over S disjoint parts of the keys.

    Args:
      outs: attention output of each part, float32, bfloat16 or float16.
      lses: natural log-sum-exp of each part's logits; -inf where a part has no key, and then
        `outs` may hold anything finite.
      implementation: a name in IMPLEMENTATIONS; None picks one.

    Returns:
      (out, lse) over all keys, as the attention ops return them: out in the dtype of `outs`;
      where no part has a key, out is 0 and lse -inf.

    Raises:
      ValueError, TypeError: an argument has a shape or dtype that is not allowed; names it.
    """
    require(outs.ndim >= 3, "outs.shape", outs.shape, "(S, ..., N, H)")
    require(outs.shape[0] >= 1, "number of parts (outs.shape[0])", outs.shape[0], "at least 1")
    require_array("outs", outs, outs.shape, *FLOAT_DTYPES)
    require_array("lses", lses, outs.shape[:-1], "float32")
    return choose(IMPLEMENTATIONS, implementation)(outs, lses)
