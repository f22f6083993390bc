import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import kv_write, paged_decode_attention, paged_prefill_attention
from kernels_pallas.kv_write.cases import TESTS


@pytest.mark.parametrize("case", TESTS, ids=lambda case: case.name)
def test_case(case):
    k_pages, v_pages, k, v, slots = case.inputs()
    result = jax.jit(kv_write)(k_pages, v_pages, k, v, slots)
    page_size = case.heads.page_size
    for pages, new, got in zip((k_pages, v_pages), (k, v), result, strict=True):
        expected = np.array(pages)
        for token, slot in enumerate(np.asarray(slots)):
            if slot >= 0:
                expected[slot // page_size, :, slot % page_size] = new[token]
        assert got.dtype == pages.dtype
        np.testing.assert_array_equal(got, expected)


def step(layers, q, k, slots, cu_q_lens, page_table, context_lens):
    """Two layers of a step, as a model unrolls them; decode if there are no chunks."""
    written = []
    for k_pages, v_pages in layers:
        k_pages, v_pages = kv_write(k_pages, v_pages, k, k, slots)
        if cu_q_lens is None:
            q, _ = paged_decode_attention(q, k_pages, v_pages, page_table, context_lens)
        else:
            rows = cu_q_lens, page_table, context_lens
            q, _ = paged_prefill_attention(q, k_pages, v_pages, *rows)
        written.append((k_pages, v_pages))
    return q, written


def compile_step(phase, num_heads, dtype, *, donate):
    page_shape, num_tokens = (2, 16, 64), 8
    pages = jax.ShapeDtypeStruct((4096, *page_shape), dtype)
    q = jax.ShapeDtypeStruct((num_tokens, num_heads, 64), dtype)
    k = jax.ShapeDtypeStruct((num_tokens, 2, 64), dtype)
    rows = num_tokens if phase == "decode" else 3
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    cu_q_lens = None if phase == "decode" else int32(rows + 1)
    lowered = jax.jit(step, donate_argnums=0 if donate else ()).lower(
        [(pages, pages)] * 2, q, k, int32(num_tokens), cu_q_lens, int32(rows, 64), int32(rows)
    )
    return lowered.compile(), pages


def pool_sized_copies(compiled, pages):
    elements = pages.size
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    return [dims for dims in copies if np.prod([int(d) for d in dims.split(",")]) >= elements]


@pytest.mark.parametrize(
    ("phase", "num_heads", "dtype"),
    [
        ("decode", 2, "float32"),
        ("decode", 4, "bfloat16"),
        ("prefill", 2, "bfloat16"),
        ("prefill", 4, "float32"),
    ],
)
def test_a_step_updates_donated_pools_in_place(phase, num_heads, dtype):
    compiled, pages = compile_step(phase, num_heads, dtype, donate=True)
    pool_bytes = pages.size * pages.dtype.itemsize
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes == 4 * pool_bytes
    assert stats.temp_size_in_bytes < pool_bytes / 8
    assert not pool_sized_copies(compiled, pages)


def test_a_copy_of_the_pool_does_not_go_unseen():
    compiled, pages = compile_step("decode", 4, "float32", donate=False)
    assert compiled.memory_analysis().alias_size_in_bytes == 0
    assert len(pool_sized_copies(compiled, pages)) == 4
