import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "paged_attention.py"


@pytest.fixture(autouse=True)
def as_users_run_it():
    """`jax.nn.dot_product_attention` of bfloat16 needs implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_example_agrees_with_dense_attention(capsys):
    runpy.run_path(str(EXAMPLE))
    assert capsys.readouterr().out == "cpu: paged and dense attention agree\n"


def test_the_example_would_notice(monkeypatch):
    """A decode that attends to one token too few."""
    import kernels_pallas

    decode = kernels_pallas.paged_decode_attention
    monkeypatch.setattr(
        kernels_pallas,
        "paged_decode_attention",
        lambda *args: decode(*args[:-1], args[-1] - np.int32(1)),
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        runpy.run_path(str(EXAMPLE))
