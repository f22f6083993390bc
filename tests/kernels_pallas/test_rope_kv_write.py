import functools

import jax
import numpy as np
import pytest
from pallas_interpret import run_triton

from kernels_pallas import kv_write, rope_kv_write
from kernels_pallas.rope_kv_write.cases import TESTS

EPS = 1e-5
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}
"""Of a value of about 1: a rounding of the dtype after the norm, and one at the end."""


def in_float64(x):
    return np.asarray(x).astype(np.float64)


def rotated_and_normed(heads, cos, sin, norm):
    """Every pair as a complex number, times that of its angle."""
    x = in_float64(heads)
    if norm is not None:
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * in_float64(norm)
    half = x.shape[-1] // 2
    angle = in_float64(cos) + 1j * in_float64(sin)
    turned = (x[..., :half] + 1j * x[..., half:]) * angle[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def function_of(implementation):
    return jax.jit(functools.partial(rope_kv_write, eps=EPS, implementation=implementation))


RUN = {"reference": lambda function, *args: function(*args), "triton": run_triton}


@pytest.mark.parametrize("implementation", RUN)
@pytest.mark.parametrize("case", TESTS, ids=lambda case: case.name)
def test_case(case, implementation):
    inputs = case.inputs()
    q, k_pages, v_pages = RUN[implementation](function_of(implementation), *inputs)
    qkv, cos, sin, old_k, old_v, slots, *norms = inputs
    q_norm, k_norm = norms or (None, None)
    K, page_size, _ = case.heads.page_shape
    tolerance = TOLERANCE[case.heads.dtype]

    assert (q.dtype, k_pages.dtype, v_pages.dtype) == (qkv.dtype,) * 3
    turned = rotated_and_normed(qkv[:, : -2 * K], cos, sin, q_norm)
    np.testing.assert_allclose(in_float64(q), turned, rtol=tolerance, atol=2 * tolerance)

    expected_k, expected_v = in_float64(old_k), in_float64(old_v)
    keys = rotated_and_normed(qkv[:, -2 * K : -K], cos, sin, k_norm)
    for token, slot in enumerate(np.asarray(slots)):
        if slot >= 0:
            expected_k[slot // page_size, :, slot % page_size] = keys[token]
            expected_v[slot // page_size, :, slot % page_size] = qkv[token, -K:]
    written = expected_k != in_float64(old_k)
    np.testing.assert_array_equal(in_float64(v_pages), expected_v)
    np.testing.assert_array_equal(in_float64(k_pages)[~written], expected_k[~written])
    np.testing.assert_allclose(in_float64(k_pages), expected_k, rtol=tolerance, atol=2 * tolerance)


def test_at_angle_0_it_is_kv_write():
    qkv, cos, sin, k_pages, v_pages, slots = TESTS[0].inputs()
    K = k_pages.shape[1]
    q, *pools = rope_kv_write(qkv, cos * 0 + 1, sin * 0, k_pages, v_pages, slots)
    expected = kv_write(k_pages, v_pages, qkv[:, -2 * K : -K], qkv[:, -K:], slots)
    np.testing.assert_array_equal(q, qkv[:, : -2 * K])
    for got, want in zip(pools, expected, strict=True):
        np.testing.assert_array_equal(got, want)
