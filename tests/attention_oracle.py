"""Attention in float64 NumPy, written for reading: what the attention ops are compared with."""

import numpy as np

HALF_ULP = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Relative error of `out`: of rounding it to its dtype, or of float32 arithmetic."""


def gather(pages, page_ids, length):
    """[length, K, H]: the first tokens of a row, float64."""
    picked = np.asarray(pages, np.float64)[np.asarray(page_ids)]
    _, kv_heads, _, head_dim = picked.shape
    return picked.transpose(0, 2, 1, 3).reshape(-1, kv_heads, head_dim)[:length]


def attend(q, k, v, first_position, *, scale=None, window=None, soft_cap=None):
    """(out [T, N, H], lse [T, N]); q is at positions from first_position, k and v at all."""
    q = np.asarray(q, np.float64)
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.einsum("tnh,snh->nts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    distance = (first_position + np.arange(len(q)))[:, None] - np.arange(len(k))[None, :]
    visible = (distance >= 0) & (distance < (np.inf if window is None else window))
    logits = np.where(visible[None], logits, -np.inf)
    highest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - highest)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("nts,snh->tnh", weights / total, v)
    return out, (np.log(total) + highest)[..., 0].T


def prefill(q, k_pages, v_pages, cu_q_lens, page_table, context_lens, **options):
    """What paged_prefill_attention computes."""
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:2], -np.inf)
    cu_q_lens, page_table = np.asarray(cu_q_lens), np.asarray(page_table)
    for r, length in enumerate(np.asarray(context_lens)):
        chunk = slice(cu_q_lens[r], cu_q_lens[r + 1])
        if chunk.start < chunk.stop:
            k, v = (gather(pages, page_table[r], length) for pages in (k_pages, v_pages))
            first_position = length - (chunk.stop - chunk.start)
            out[chunk], lse[chunk] = attend(q[chunk], k, v, first_position, **options)
    return out, lse


def decode(q, k_pages, v_pages, page_table, context_lens, **options):
    """What paged_decode_attention computes: chunks of one token, or none."""
    active = np.flatnonzero(np.asarray(context_lens))
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:2], -np.inf)
    out[active], lse[active] = prefill(
        np.asarray(q)[active],
        k_pages,
        v_pages,
        np.arange(len(active) + 1),
        np.asarray(page_table)[active],
        np.asarray(context_lens)[active],
        **options,
    )
    return out, lse


def assert_matches(result, expected):
    """`result` (out, lse) is `expected`, up to float32 arithmetic and the rounding of out."""
    (out, lse), (expected_out, expected_lse) = result, expected
    assert lse.dtype == np.float32
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected_out, rtol=HALF_ULP[out.dtype.name], atol=1e-5
    )
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected_lse, rtol=1e-5, atol=1e-5)
