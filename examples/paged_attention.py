"""Paged attention in a JAX program, with `kernels_pallas` alone. Runs on a CPU and on a GPU.

A pool of pages holds the keys and values of all sequences; a page table says which page has which
part of a sequence. Pages are taken as sequences grow, and nothing is ever moved.
"""

# %% A pool of 32 pages of 16 tokens, for 2 key-value heads; page 0 is scratch, for padding.
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import kv_write, paged_decode_attention, paged_prefill_attention

PAGE, KV_HEADS, HEADS, DIM = 16, 2, 8, 64
pools = [jnp.zeros((32, KV_HEADS, PAGE, DIM), jnp.bfloat16) for _ in ("keys", "values")]
page_table = np.array([[7, 3, 0], [12, 5, 9]], np.int32)  # of two sequences
lens = np.array([20, 41], np.int32)
write = jax.jit(kv_write, donate_argnums=(0, 1))  # donated, the pools are updated where they lie


def slots(sequence, position):
    """Where a token lives in the pools."""
    return page_table[sequence, position // PAGE] * PAGE + position % PAGE


def qkv(seed, num_tokens):
    shape = (num_tokens, HEADS + 2 * KV_HEADS, DIM)
    heads = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    return jnp.split(heads, (HEADS, HEADS + KV_HEADS), axis=1)


# %% Prefill: two prompts of 20 and 41 tokens, one after another on one axis, without padding.
q, k, v = qkv(0, 20 + 41)
position = np.concatenate([np.arange(n, dtype=np.int32) for n in lens])
pools = write(*pools, k, v, slots(np.repeat((0, 1), lens), position))
out, _ = paged_prefill_attention(q, *pools, np.array([0, 20, 61], np.int32), page_table, lens)

# %% Decode: one new token for each sequence.
q1, k1, v1 = qkv(1, 2)
pools = write(*pools, k1, v1, slots((0, 1), lens))
out1, _ = paged_decode_attention(q1, *pools, page_table, lens + 1)

# %% The second sequence by JAX's own attention: its 41 tokens, then the new one after them.
dense = jax.nn.dot_product_attention(q[None, 20:], k[None, 20:], v[None, 20:], is_causal=True)
k, v = (jnp.concatenate([old[20:], new[1:]])[None] for old, new in ((k, k1), (v, v1)))
dense1 = jax.nn.dot_product_attention(q1[None, 1:], k, v)
for ours, theirs in ((out[20:], dense[0]), (out1[1:], dense1[0])):
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=0.02)
print(f"{jax.devices()[0].device_kind}: paged and dense attention agree")
