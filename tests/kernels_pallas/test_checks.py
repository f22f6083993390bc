"""Every op refuses what it cannot do, and says which argument is wrong."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import (
    kv_write,
    merge_attention,
    paged_decode_attention,
    paged_prefill_attention,
    rope_kv_write,
)
from kernels_pallas.checks import UnsupportedError, choose

pytestmark = pytest.mark.usefixtures("unchecked")


def zeros(*shape):
    return jnp.zeros(shape)


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


VALID = {
    paged_decode_attention: {
        "q": zeros(3, 4, 16),
        "k_pages": zeros(5, 2, 8, 16),
        "v_pages": zeros(5, 2, 8, 16),
        "page_table": ints(3, 2),
        "context_lens": ints(3),
    },
    paged_prefill_attention: {
        "q": zeros(9, 4, 16),
        "k_pages": zeros(5, 2, 8, 16),
        "v_pages": zeros(5, 2, 8, 16),
        "cu_q_lens": ints(4),
        "page_table": ints(3, 2),
        "context_lens": ints(3),
    },
    kv_write: {
        "k_pages": zeros(5, 2, 8, 16),
        "v_pages": zeros(5, 2, 8, 16),
        "k": zeros(3, 2, 16),
        "v": zeros(3, 2, 16),
        "slot_mapping": ints(3),
    },
    rope_kv_write: {
        "qkv": zeros(3, 8, 16),
        "cos": zeros(3, 8),
        "sin": zeros(3, 8),
        "k_pages": zeros(5, 2, 8, 16),
        "v_pages": zeros(5, 2, 8, 16),
        "slot_mapping": ints(3),
        "q_norm": zeros(16),
        "k_norm": zeros(16),
    },
    merge_attention: {"outs": zeros(2, 3, 4, 16), "lses": zeros(2, 3, 4)},
}
ATTENTION = (paged_decode_attention, paged_prefill_attention)
WRITING = (kv_write, rope_kv_write)
WITH_PAGES = (*ATTENTION, *WRITING)
INF = float("inf")

WRONG = [
    *((op, "k_pages", zeros(5, 2, 8), ValueError) for op in WITH_PAGES),
    *((op, "k_pages", ints(5, 2, 8, 16), TypeError) for op in WITH_PAGES),
    *((op, "k_pages", zeros(5, 2, 0, 16), ValueError) for op in WITH_PAGES),
    *((op, "v_pages", zeros(5, 2, 4, 16), ValueError) for op in WITH_PAGES),
    *((op, "v_pages", zeros(5, 2, 8, 16).astype("bfloat16"), TypeError) for op in WITH_PAGES),
    *((op, "q", zeros(3, 4, 32), ValueError) for op in ATTENTION),
    *((op, "q", zeros(3, 4, 16).astype("float16"), TypeError) for op in ATTENTION),
    *((op, "q", zeros(3, 3, 16), ValueError) for op in ATTENTION),
    *((op, "q", zeros(0, 4, 16), ValueError) for op in ATTENTION),
    *((op, "page_table", ints(6), ValueError) for op in ATTENTION),
    *((op, "page_table", ints(3, 0), ValueError) for op in ATTENTION),
    *((op, "page_table", zeros(3, 2), TypeError) for op in ATTENTION),
    *((op, "context_lens", ints(2), ValueError) for op in ATTENTION),
    *((op, "context_lens", zeros(3), TypeError) for op in ATTENTION),
    *((op, "scale", scale, ValueError) for op in ATTENTION for scale in (0.0, INF, float("nan"))),
    *((op, "window", 0, ValueError) for op in ATTENTION),
    *((op, "soft_cap", cap, ValueError) for op in ATTENTION for cap in (-1.0, INF)),
    *((op, "implementation", "cudnn", ValueError) for op in VALID),
    (paged_decode_attention, "page_table", ints(4, 2), ValueError),
    (paged_prefill_attention, "page_table", ints(0, 2), ValueError),
    (paged_prefill_attention, "cu_q_lens", ints(3), ValueError),
    (paged_prefill_attention, "cu_q_lens", zeros(4), TypeError),
    (kv_write, "k", zeros(3, 4, 16), ValueError),
    (kv_write, "k", zeros(3, 2, 16).astype("bfloat16"), TypeError),
    (kv_write, "v", zeros(4, 2, 16), ValueError),
    *((op, "slot_mapping", ints(2), ValueError) for op in WRITING),
    *((op, "slot_mapping", zeros(3), TypeError) for op in WRITING),
    (rope_kv_write, "qkv", zeros(0, 8, 16), ValueError),
    (rope_kv_write, "qkv", zeros(3, 4, 16), ValueError),
    (rope_kv_write, "qkv", zeros(3, 9, 16), ValueError),
    (rope_kv_write, "qkv", zeros(3, 8, 32), ValueError),
    (rope_kv_write, "qkv", zeros(3, 8, 16).astype("bfloat16"), TypeError),
    (rope_kv_write, "cos", zeros(3, 16), ValueError),
    (rope_kv_write, "sin", zeros(2, 8), ValueError),
    (rope_kv_write, "sin", zeros(3, 8).astype("bfloat16"), TypeError),
    (rope_kv_write, "q_norm", zeros(8), ValueError),
    (rope_kv_write, "k_norm", zeros(16).astype("bfloat16"), TypeError),
    (rope_kv_write, "k_norm", None, ValueError),
    (rope_kv_write, "eps", 0.0, ValueError),
    (merge_attention, "outs", zeros(3, 16), ValueError),
    (merge_attention, "outs", zeros(0, 3, 4, 16), ValueError),
    (merge_attention, "outs", ints(2, 3, 4, 16), TypeError),
    (merge_attention, "lses", zeros(2, 3), ValueError),
    (merge_attention, "lses", zeros(2, 3, 4).astype("bfloat16"), TypeError),
]


def test_slots_that_int32_cannot_name_are_refused():
    pages = jax.ShapeDtypeStruct((2**25, 1, 64, 2), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((3, 1, 2), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"slots of k_pages is 2147483648; allowed: below 2\*\*31"):
        jax.eval_shape(kv_write, pages, pages, new, new, ints(3))


@pytest.mark.parametrize("op", VALID, ids=lambda op: op.__name__)
def test_the_arguments_that_the_wrong_ones_replace_are_right(op):
    for implementation in (None, "reference"):
        jax.eval_shape(functools.partial(op, implementation=implementation), **VALID[op])


@pytest.mark.parametrize(("op", "name", "value", "error"), WRONG)
def test_a_wrong_argument_is_named(op, name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b.*allowed: "):
        op(**{**VALID[op], name: value})


def only(*supported):
    def implementation(name, argument):
        if argument not in supported:
            raise UnsupportedError(f"argument is {argument!r}; allowed: {supported}")
        return name, argument

    return implementation


TABLE = {
    name: functools.partial(only(*supported), name)
    for name, supported in {
        "reference": (1, 2, 3),
        "mosaic_gpu": (1,),
        "triton": (1, 2),
    }.items()
}


@pytest.mark.parametrize(
    ("device_kind", "argument", "name"),
    [
        (None, 1, "reference"),
        ("NVIDIA H100 80GB HBM3", 1, "mosaic_gpu"),
        ("NVIDIA H200", 1, "mosaic_gpu"),
        ("NVIDIA H200", 2, "triton"),
        ("NVIDIA H200", 3, "reference"),
        ("NVIDIA A100-SXM4-80GB", 1, "triton"),
        ("NVIDIA A100-SXM4-80GB", 3, "reference"),
        ("NVIDIA B200", 1, "triton"),
    ],
)
def test_the_device_and_the_arguments_choose(device_kind, argument, name):
    mesh = AbstractMesh((), ())
    if device_kind is not None:
        device = AbstractDevice(device_kind=device_kind, platform="gpu", num_cores=132)
        mesh = AbstractMesh((), (), abstract_device=device)
    with use_abstract_mesh(mesh):
        assert choose(TABLE, None)(argument) == (name, argument)


def test_what_no_implementation_supports_is_refused():
    with pytest.raises(UnsupportedError, match=r"argument is 4; allowed: \(1, 2, 3\)"):
        choose(TABLE, None)(4)


def test_an_implementation_that_is_named_is_the_one():
    with pytest.raises(UnsupportedError, match=r"argument is 3; allowed: \(1,\)"):
        choose(TABLE, "mosaic_gpu")(3)
