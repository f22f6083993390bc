"""The shared device state that both step functions donate and return."""

from typing import no_type_check

import flax.struct
from jaxtyping import Array, Int32

type LayerCache = dict[str, Array]
"""One layer's KV arrays by name (`models.spec.KVArray`), each [num_pages, *page_shape]."""


@no_type_check  # unflatten goes through __init__ with non-arrays
@flax.struct.dataclass
class SharedState:
    """Everything that steps write, in memory that all workers share.

    Attributes:
      layers: KV cache of each layer. Page 0 is scratch.
      tokens: every row's tokens by position, prompt and output. Row 0 is scratch.
    """

    layers: list[LayerCache]
    tokens: Int32[Array, "rows length"]
