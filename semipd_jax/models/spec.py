"""What the rest of the engine knows of a model family, as plain data: no jax here.

A family is one `ModelFamily` value beside its flax module. The memory owner reads the weights by
it, the runtime builds the module and the KV pool by it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from semipd_jax.errors import StartupError


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One parameter in its final layout.

    Attributes:
      path: where it is in the module's state, for example "layers/0/attention/qkv_proj".
      shape: in the final layout; matrices are [out, in].
      sources: names in a Hugging Face checkpoint, concatenated along axis 0 to give `shape`.
      source_shapes: of each of them.
    """

    path: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class KVArray:
    """One array of one layer's KV cache.

    Attributes:
      name: key in the layer's cache, for example "k_pages".
      page_shape: of one page, for example (K, page_size, H) or, for a latent cache,
        (page_size, 576). The array is [num_pages, *page_shape].
    """

    name: str
    page_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model: a family applied to a config.json.

    Attributes:
      architecture: as config.json names it.
      config: the family's own frozen dataclass; the module takes it.
      checkpoint_dtype: "float32", "bfloat16" or "float16".
      max_model_len: the model's own limit in tokens.
    """

    architecture: str
    config: Any
    checkpoint_dtype: str
    vocab_size: int
    num_layers: int
    max_model_len: int
    weights: tuple[WeightSpec, ...]
    kv_layout: Callable[[int], tuple[KVArray, ...]]
    """page_size → the arrays of one layer's cache (every layer has the same)."""

    def max_len(self, asked: int | None) -> int:
        """Most tokens of a request: the model's own limit, unless less is asked for.

        Raises:
          StartupError: more is asked for.
        """
        if asked is not None and asked > self.max_model_len:
            raise StartupError(
                f"max_model_len is {asked}; allowed: 2 to {self.max_model_len}, the model's own "
                "limit"
            )
        return self.max_model_len if asked is None else asked


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """How to read config.json of some architectures.

    Attributes:
      parse: config.json → ModelSpec; raises CheckpointError for what the family does not support.
      module: "package.module:Class" of the flax module, imported only where jax may be.
    """

    architectures: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], ModelSpec]
    module: str
