"""Orbax: the parameter tree in final layout, as the stock Orbax API writes it, under `params/`.

It is read with tensorstore alone, because orbax imports jax. Leaves are at the paths of
`WeightSpec`; config.json, tokenizer and generation files lie beside `params/`.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorstore as ts

from semipd_jax.errors import CheckpointError
from semipd_jax.models.checkpoint.blocks import check_names, check_tensor, copy_cast
from semipd_jax.models.fields import Fields, read_json
from semipd_jax.models.spec import WeightSpec

SUBDIRECTORY: Final = "params"

_METADATA: Final = "_METADATA"
_TIMEOUT_S: Final = 300.0


def is_present(directory: Path) -> bool:
    return (directory / SUBDIRECTORY / _METADATA).is_file()


class OrbaxReader:
    """Opens every leaf and checks it against the weight table; reads weights on demand."""

    def __init__(self, directory: Path, weights: Iterable[WeightSpec]) -> None:
        base = directory / SUBDIRECTORY
        expected = {weight.path: weight.shape for weight in weights}
        metadata = Fields(read_json(base / _METADATA), _METADATA)
        check_names(str(base), expected.keys(), _leaf_paths(metadata))
        metadata.require(metadata.flag("use_ocdbt", False), "use_ocdbt", "true")
        driver = "zarr3" if metadata.flag("use_zarr3", False) else "zarr"
        self._leaves = {path: _open_leaf(base, driver, path) for path in expected}
        for path, leaf in self._leaves.items():
            check_tensor(f"{base}: {path}", leaf.shape, leaf.dtype.name, expected[path])

    def read(self, weight: WeightSpec, out: np.ndarray) -> None:
        """Fills `out`, one stored chunk at a time."""
        leaf = self._leaves[weight.path]
        chunk = leaf.chunk_layout.read_chunk.shape
        starts = (range(0, n, step) for n, step in zip(leaf.shape, chunk, strict=True))
        for corner in itertools.product(*starts):
            cell = tuple(
                slice(start, min(start + step, n))
                for start, step, n in zip(corner, chunk, leaf.shape, strict=True)
            )
            try:
                block = leaf[cell].read().result(timeout=_TIMEOUT_S)
            except ValueError as error:
                raise CheckpointError(f"{weight.path} is damaged: {error}") from error
            copy_cast(block, out[cell], weight.path)


def _leaf_paths(metadata: Fields) -> set[str]:
    leaves = metadata.section("tree_metadata")
    return {
        "/".join(key.text("key") for key in leaves.section(leaf).sections("key_metadata"))
        for leaf in leaves.names()
    }


def _open_leaf(base: Path, driver: str, path: str) -> Any:
    store = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{base.resolve()}/"},
        "path": path.replace("/", ".") + "/",
    }
    try:
        opened = ts.open({"driver": driver, "kvstore": store}, open=True, read=True)
        return opened.result(timeout=_TIMEOUT_S)
    except ValueError as error:
        raise CheckpointError(f"{base}: cannot read {path}: {error}") from error
