"""Attention in float64 NumPy, written for reading: what every op is compared with."""

import numpy as np


def gather(pages: np.ndarray, page_ids: np.ndarray, length: int) -> np.ndarray:
    """[length, K, H] tokens of one row, float64."""
    picked = np.asarray(pages, np.float64)[np.asarray(page_ids)]
    _, kv_heads, _, head_dim = picked.shape
    return picked.transpose(0, 2, 1, 3).reshape(-1, kv_heads, head_dim)[:length]


def attend(q, k, v, first_position, *, scale=None, window=None, soft_cap=None):
    """q [T, N, H] at positions first_position.. over k, v [S, K, H] at positions 0.. , causal.

    Returns (out [T, N, H], lse [T, N]).
    """
    q = np.asarray(q, np.float64)
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.einsum("tnh,snh->nts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    back = (first_position + np.arange(len(q)))[:, None] - np.arange(len(k))[None, :]
    visible = (back >= 0) & (back < (window or np.inf))
    logits = np.where(visible[None], logits, -np.inf)
    highest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - highest)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("nts,snh->tnh", weights / total, v)
    return out, (np.log(total) + highest)[..., 0].T


def decode(q, k_pages, v_pages, page_table, context_lens, **options):
    out = np.zeros(q.shape, np.float64)
    lse = np.full(q.shape[:2], -np.inf)
    for b, length in enumerate(np.asarray(context_lens)):
        if length:
            k, v = (gather(pages, page_table[b], length) for pages in (k_pages, v_pages))
            row_out, row_lse = attend(q[b : b + 1], k, v, length - 1, **options)
            out[b], lse[b] = row_out[0], row_lse[0]
    return out, lse


def prefill(q, k_pages, v_pages, cu_q_lens, page_table, context_lens, **options):
    out = np.zeros(q.shape, np.float64)
    lse = np.full(q.shape[:2], -np.inf)
    for r, length in enumerate(np.asarray(context_lens)):
        chunk = slice(int(cu_q_lens[r]), int(cu_q_lens[r + 1]))
        if chunk.start < chunk.stop:
            k, v = (gather(pages, page_table[r], length) for pages in (k_pages, v_pages))
            first = length - (chunk.stop - chunk.start)
            out[chunk], lse[chunk] = attend(q[chunk], k, v, first, **options)
    return out, lse
