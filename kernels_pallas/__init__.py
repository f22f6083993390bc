"""Paged attention for JAX: one folder per op, each with an API and a table of implementations."""

from kernels_pallas.kv_write import kv_write
from kernels_pallas.merge_attention import merge_attention
from kernels_pallas.paged_decode_attention import paged_decode_attention
from kernels_pallas.paged_prefill_attention import paged_prefill_attention
from kernels_pallas.rope_kv_write import rope_kv_write

__all__ = [
    "kv_write",
    "merge_attention",
    "paged_decode_attention",
    "paged_prefill_attention",
    "rope_kv_write",
]
