import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.storage.manifest import (
    ALIGNMENT,
    ArrayEntry,
    Region,
    SharingError,
    check,
    lay_out,
    numpy_dtype,
)

DTYPES = ("float32", "bfloat16", "float16", "int32")
SHAPES = st.lists(st.integers(1, 40), max_size=4).map(tuple)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=20))
def test_arrays_are_aligned_disjoint_and_inside(arrays: list[tuple[tuple[int, ...], str]]) -> None:
    region = lay_out("r", [(str(i), shape, dtype) for i, (shape, dtype) in enumerate(arrays)])
    check(region)
    end = 0
    for entry, (shape, dtype) in zip(region.arrays, arrays, strict=True):
        assert entry.shape == shape
        assert entry.offset % ALIGNMENT == 0
        assert end <= entry.offset < end + ALIGNMENT
        end = entry.offset + math.prod(shape) * np.zeros((), numpy_dtype(dtype)).nbytes
    assert region.num_bytes == max(end, 1)
    assert msgspec.json.decode(msgspec.json.encode(region), type=Region) == region


@pytest.mark.parametrize(
    "arrays",
    [
        [ArrayEntry("a", (4,), "float32", offset=128)],
        [ArrayEntry("a", (4,), "float32", offset=-256)],
        [ArrayEntry("a", (-4,), "float32", offset=0)],
        [ArrayEntry("a", (257,), "float32", offset=0)],
        [ArrayEntry("a", (4,), "float32", offset=1024)],
        [ArrayEntry("a", (4,), "object", offset=0)],
        [ArrayEntry("a", (65,), "float32", offset=0), ArrayEntry("b", (4,), "float32", offset=256)],
        [ArrayEntry("a", (4,), "float32", offset=256), ArrayEntry("b", (4,), "float32", offset=0)],
        [ArrayEntry("a", (4,), "float32", offset=0), ArrayEntry("a", (4,), "float32", offset=256)],
    ],
    ids=[
        "misaligned",
        "before the start",
        "negative shape",
        "too large",
        "past the end",
        "dtype",
        "overlap",
        "order",
        "same path",
    ],
)
def test_refuses_a_manifest_that_does_not_fit(arrays: list[ArrayEntry]) -> None:
    with pytest.raises(SharingError, match="'r'"):
        check(Region("r", 1024, tuple(arrays)))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="dtype is 'object'; allowed: float32"):
        numpy_dtype("object")
    with pytest.raises(SharingError, match="'r' has no array 'b'"):
        lay_out("r", [("a", (4,), "float32")]).entry("b")
