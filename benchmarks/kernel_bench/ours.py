"""The ops of `kernels_pallas`, and JAX's own attention, as contenders."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from benchmarks.kernel_bench.chains import chained
from benchmarks.kernel_bench.timing import Contender

NUM_CALLS: Final = {
    "paged_decode_attention": 24,
    "paged_prefill_attention": 4,
    "kv_write": 24,
    "rope_kv_write": 24,
}
"""In a program: enough that the host starts the next one before it ends."""

WRITES: Final = ("kv_write", "rope_kv_write")
"""Ops that update pools."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender, and what one call of it returns: `out`, or (out, lse)."""

    contender: Contender
    output: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """A case on the device.

    Attributes:
      inputs: as the op takes them.
      pools: pairs of pools with the same pages, enough to exceed the L2 cache together.
    """

    op: str
    case: Any
    inputs: tuple[Any, ...]
    pools: tuple[tuple[Any, Any], ...]

    @property
    def options(self) -> dict[str, Any]:
        return getattr(self.case, "options", {})


def setting(op: str, case: Any, *, l2_bytes: int) -> Setting:
    """Random inputs, made on the device."""
    rows = iter(case.rows(np.random.default_rng(0)))
    keys = iter(jax.random.split(jax.random.key(0), 64))
    inputs = tuple(
        jax.random.normal(next(keys), s.shape, s.dtype)
        if jnp.issubdtype(s.dtype, jnp.floating)
        else next(rows)
        for s in case.specs
    )
    if op in WRITES:
        return Setting(op, case, inputs, ())
    pages = case.specs[1]
    pool_bytes = 2 * pages.size * pages.dtype.itemsize
    others = range(min(15, -(-2 * l2_bytes // pool_bytes) - 1))

    def pool() -> tuple[Any, Any]:
        k_pages, v_pages = (
            jax.random.normal(next(keys), pages.shape, pages.dtype) for _ in range(2)
        )
        return k_pages, v_pages

    return Setting(op, case, inputs, ((inputs[1], inputs[2]), *(pool() for _ in others)))


def implementation(setting: Setting, name: str) -> Entry:
    """One implementation of the op."""
    op = getattr(kernels_pallas, setting.op)
    call = functools.partial(op, implementation=name, **setting.options)
    return Entry(
        _CHAINS[setting.op](setting, call, NUM_CALLS[setting.op]),
        lambda: jax.jit(call)(*setting.inputs),
    )


def _chain_of_attention(setting: Setting, call: Callable[..., Any], num_calls: int) -> Contender:
    q, _, _, *rows = setting.inputs
    rest = [(*pool, *rows) for pool in setting.pools]
    return chained(lambda *args: call(*args)[0], q, rest, num_calls)


def _chain_of_kv_write(setting: Setting, call: Callable[..., Any], num_calls: int) -> Contender:
    k_pages, v_pages, *new = setting.inputs
    return chained(
        lambda pools, *new: call(*pools, *new), (k_pages, v_pages), [tuple(new)], num_calls
    )


def _chain_of_rope_kv_write(
    setting: Setting, call: Callable[..., Any], num_calls: int
) -> Contender:
    qkv, cos, sin, k_pages, v_pages, *rest = setting.inputs
    kv_heads = k_pages.shape[1]

    def write(state: Any, qkv: Any, *rest: Any) -> Any:
        # Queries that nobody waits for would not be computed.
        qkv, state = jax.lax.optimization_barrier((qkv, state))
        _, k_pages, v_pages = state
        return call(qkv, *rest[:2], k_pages, v_pages, *rest[2:])

    first = qkv[:, : -2 * kv_heads], k_pages, v_pages
    return chained(write, first, [(qkv, cos, sin, *rest)], num_calls)


_CHAINS: Final = {
    "paged_decode_attention": _chain_of_attention,
    "paged_prefill_attention": _chain_of_attention,
    "kv_write": _chain_of_kv_write,
    "rope_kv_write": _chain_of_rope_kv_write,
}


def jax_paged_attention(setting: Setting) -> Entry:
    """JAX's deprecated Triton kernel, with pools laid out as it wants them."""
    from jax.experimental.pallas.ops.gpu import paged_attention as deprecated

    if setting.op != "paged_decode_attention" or "window" in setting.options:
        raise NotImplementedError("decode without a window only")
    q, _, _, table, lens = setting.inputs
    num_splits = gcd(16, table.shape[1])
    block_pages = gcd(8, table.shape[1] // num_splits)

    def call(*args: Any) -> Any:
        out = deprecated.paged_attention(
            *args,
            k_splits=num_splits,
            pages_per_compute_block=block_pages,
            attn_logits_soft_cap=setting.options.get("soft_cap"),
        )
        return out.astype(q.dtype)

    turned = [tuple(jnp.swapaxes(pages, 0, 1) for pages in pool) for pool in setting.pools]
    rest = [(*pool, table, lens) for pool in turned]
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # which this op leaves to its caller
    contender = chained(call, q, rest, NUM_CALLS[setting.op])
    return Entry(contender, lambda: jax.jit(call)(scaled, *rest[0]))


def jax_dense_attention(
    setting: Setting, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Entry:
    """`jax.nn.dot_product_attention` on gathered keys and values; gathering is not timed.

    Chunks must be alike and without history: it aligns the causal mask with the first key.
    """
    case: Any = setting.case
    if setting.op != "paged_prefill_attention" or setting.options or case.num_padding:
        raise NotImplementedError("prefill without options and padding only")
    if any(case.histories) or len(set(case.q_lens)) > 1:
        raise NotImplementedError("chunks of equal length without history only")
    q, _, _, _, table, _ = setting.inputs
    rows, tokens = len(case.q_lens), case.q_lens[0]
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )

    def gather(pages: Any) -> Any:
        _, kv_heads, _, head_dim = pages.shape
        in_order = jnp.swapaxes(pages[table], 2, 3)
        return in_order.reshape(rows, -1, kv_heads, head_dim)[:, :tokens]

    dense = [tuple(gather(pages) for pages in pool) for pool in setting.pools]
    queries = q.reshape(rows, tokens, *q.shape[1:])
    contender = chained(attend, queries, dense, NUM_CALLS[setting.op])
    return Entry(contender, lambda: jax.jit(attend)(queries, *dense[0]).reshape(q.shape))
