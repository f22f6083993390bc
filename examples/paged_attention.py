"""Paged attention in a JAX program, with `kernels_pallas` alone. Runs on a CPU and on a GPU.

A pool of pages holds the keys and values of all sequences; a page table says which page has which
part of a sequence. Pages are taken as sequences grow, and nothing is ever moved.
"""

# %% A pool: 32 pages of 16 tokens, 2 key-value heads; page 0 is scratch, where padding points.
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import kv_write, paged_decode_attention, paged_prefill_attention

NUM_PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM, QUERY_HEADS = 32, 2, 16, 64, 8
k_pages, v_pages = (
    jnp.zeros((NUM_PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM), jnp.bfloat16) for _ in range(2)
)
page_table = np.array([[7, 3, 0, 0], [12, 5, 9, 0]], np.int32)  # of two sequences, padded with 0


def slots(sequence: int, first: int, end: int) -> np.ndarray:
    """Where the tokens from `first` to `end` of a sequence live in the pool."""
    positions = np.arange(first, end, dtype=np.int32)
    return page_table[sequence, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE


write = jax.jit(kv_write, donate_argnums=(0, 1))  # donated, the pool is updated where it lies

# %% Prefill: two prompts of 20 and 41 tokens, one after another on one axis, without padding.
lens = np.array([20, 41], np.int32)
keys = jax.random.split(jax.random.key(0), 6)
normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
q = normal(keys[0], (int(lens.sum()), QUERY_HEADS, HEAD_DIM))
k, v = (normal(key, (int(lens.sum()), KV_HEADS, HEAD_DIM)) for key in keys[1:3])
all_slots = np.concatenate([slots(sequence, 0, end) for sequence, end in enumerate(lens)])
k_pages, v_pages = write(k_pages, v_pages, k, v, all_slots)
cu_q_lens = np.array([0, 20, 61], np.int32)
out, lse = paged_prefill_attention(q, k_pages, v_pages, cu_q_lens, page_table, lens)

# %% Decode: one new token for each sequence.
q1 = normal(keys[3], (2, QUERY_HEADS, HEAD_DIM))
k1, v1 = (normal(key, (2, KV_HEADS, HEAD_DIM)) for key in keys[4:])
new_slots = np.concatenate([slots(sequence, end, end + 1) for sequence, end in enumerate(lens)])
k_pages, v_pages = write(k_pages, v_pages, k1, v1, new_slots)
out1, _ = paged_decode_attention(q1, k_pages, v_pages, page_table, lens + 1)

# %% The same from JAX's own attention, sequence by sequence.
for sequence, (first, end) in enumerate(((0, 20), (20, 61))):
    rows = slice(first, end)
    dense = jax.nn.dot_product_attention(
        q[None, rows], k[None, rows], v[None, rows], is_causal=True
    )
    longer_k, longer_v = (
        jnp.concatenate([old[rows], new[sequence : sequence + 1]])[None]
        for old, new in ((k, k1), (v, v1))
    )
    dense1 = jax.nn.dot_product_attention(q1[None, sequence : sequence + 1], longer_k, longer_v)
    np.testing.assert_allclose(*np.float32([out[rows], dense[0]]), atol=0.02)
    np.testing.assert_allclose(*np.float32([out1[sequence], dense1[0, 0]]), atol=0.02)
print(f"{jax.devices()[0].device_kind}: paged and dense attention agree")
