import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, ShareConfig
from semipd_jax.errors import StartupError
from semipd_jax.models.spec import KVArray, ModelSpec, WeightSpec
from semipd_jax.owner.plan import (
    MemoryPlan,
    activation_bytes,
    plan_memory,
    summary,
)
from semipd_jax.storage.budget import Budget
from semipd_jax.storage.manifest import ALIGNMENT, check

GIB = 2**30
PAGE_BYTES = 3 * 2 * (2 * 16 * 8) * 4  # layers, k and v, (heads, page_size, head_dim), float32
LONGEST = 1000 // 16 + 1  # pages of one request


def model(*, max_model_len: int = 1000, vocab_size: int = 50) -> ModelSpec:
    return ModelSpec(
        architecture="Test",
        config=None,
        checkpoint_dtype="bfloat16",
        vocab_size=vocab_size,
        num_layers=3,
        max_model_len=max_model_len,
        weights=(
            WeightSpec("embed", (vocab_size, 16), ("embed",), ((vocab_size, 16),)),
            WeightSpec("norm", (16,), ("norm",), ((16,),)),
        ),
        kv_layout=lambda page_size: (
            KVArray("k_pages", (2, page_size, 8)),
            KVArray("v_pages", (2, page_size, 8)),
        ),
    )


def plan(
    spec: ModelSpec | None = None,
    *,
    available_bytes: int = GIB,
    memory_bytes: int | None = None,
    max_num_seqs: int = 4,
    pool_takes_rest: bool = False,
    **options: Any,
) -> MemoryPlan:
    config = EngineConfig(
        model=ModelConfig(path="/model", **options),
        cache=CacheConfig(memory_bytes=memory_bytes),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
    )
    return plan_memory(
        spec or model(),
        config,
        eos_token_ids=(2, 7),
        budget=Budget(available_bytes=available_bytes, pool_takes_rest=pool_takes_rest),
        default_dtype="float32",
        default_page_size=16,
    )


def test_page_size_is_the_device_s_unless_it_was_chosen() -> None:
    def page_size(chosen: int | None) -> int:
        config = EngineConfig(model=ModelConfig(path="m"), cache=CacheConfig(page_size=chosen))
        budget = Budget(available_bytes=GIB)
        found = plan_memory(
            model(), config, eos_token_ids=(), budget=budget, default_dtype=None,
            default_page_size=64,
        )  # fmt: skip
        return found.layout.page_size

    assert (page_size(None), page_size(32)) == (64, 32)


def test_pool_holds_every_row_at_full_length_if_there_is_memory() -> None:
    layout = plan().layout
    assert layout.num_pages == 1 + 4 * LONGEST
    assert layout.kv_bytes == layout.num_pages * PAGE_BYTES
    assert layout.num_rows == 5
    assert layout.max_model_len == 1000
    assert layout.page_size == 16
    assert layout.vocab_size == 50
    assert layout.eos_token_ids == (2, 7)


def test_pool_takes_at_most_a_quarter_of_what_the_weights_leave() -> None:
    available = 8 * LONGEST * PAGE_BYTES
    weights = plan().weights.num_bytes
    layout = plan(available_bytes=available).layout
    assert 0.24 < layout.kv_bytes / (available - weights) <= 0.25
    assert 1 + LONGEST <= layout.num_pages < 1 + 4 * LONGEST


def test_pool_is_as_large_as_asked_for() -> None:
    assert plan(memory_bytes=100 * PAGE_BYTES + 1).layout.num_pages == 100
    assert plan(memory_bytes=1000 * PAGE_BYTES).layout.num_pages == 1000


def test_regions() -> None:
    memory = plan()
    pages, dtype = memory.layout.num_pages, "float32"
    assert [(a.path, a.shape, a.dtype) for a in memory.weights.arrays] == [
        ("embed", (50, 16), dtype),
        ("norm", (16,), dtype),
    ]
    assert [(a.path, a.shape, a.dtype) for a in memory.state.arrays] == [
        ("layers/0/k_pages", (pages, 2, 16, 8), dtype),
        ("layers/0/v_pages", (pages, 2, 16, 8), dtype),
        ("layers/1/k_pages", (pages, 2, 16, 8), dtype),
        ("layers/1/v_pages", (pages, 2, 16, 8), dtype),
        ("layers/2/k_pages", (pages, 2, 16, 8), dtype),
        ("layers/2/v_pages", (pages, 2, 16, 8), dtype),
        ("tokens", (5, 1001), "int32"),
    ]
    assert memory.state.writable
    assert not memory.weights.writable
    for region in (memory.weights, memory.state):
        check(region)


def test_dtype() -> None:
    half = plan(dtype="bfloat16")
    assert half.layout.dtype == "bfloat16"
    assert {a.dtype for a in half.state.arrays} == {"bfloat16", "int32"}
    assert half.layout.kv_bytes == half.layout.num_pages * PAGE_BYTES // 2
    assert plan(dtype="auto").layout.dtype == "float32"  # the checkpoint's is bfloat16


def test_max_model_len() -> None:
    assert plan(max_model_len=20).layout.max_model_len == 20
    with pytest.raises(StartupError, match="max_model_len is 1001; allowed: 2 to 1000"):
        plan(max_model_len=1001)


def test_request_of_full_length_must_fit() -> None:
    least = (1 + LONGEST) * PAGE_BYTES
    assert plan(memory_bytes=least).layout.num_pages == 1 + LONGEST
    match = f"holds 992 tokens, fewer .* 1000: .* kv_cache_memory_bytes to at least {least}"
    with pytest.raises(StartupError, match=match):
        plan(memory_bytes=least - 1)
    with pytest.raises(StartupError, match="holds 0 tokens"):
        plan(memory_bytes=1)


def test_dtype_of_the_checkpoint_where_the_platform_has_no_preference() -> None:
    config = EngineConfig(model=ModelConfig(path="/model"))
    budget = Budget(available_bytes=GIB, worker_fraction=0.05)
    layout = plan_memory(
        model(), config, eos_token_ids=(), budget=budget, default_dtype=None, default_page_size=16
    ).layout
    assert layout.dtype == "bfloat16"
    assert layout.worker_fraction == 0.05


def test_activations_of_a_step_grow_with_its_tokens_and_rows() -> None:
    def of(tokens: int, rows: int) -> int:
        limits = SchedulerConfig(max_num_batched_tokens=tokens, max_num_seqs=rows)
        config = EngineConfig(model=ModelConfig(path="/model"), scheduler=limits)
        return activation_bytes(model(vocab_size=50), config)

    assert of(200, 4) - of(100, 4) == 100 * 16 * 4 * 4  # the widest activation, float32, 4 alive
    assert of(100, 5) - of(100, 4) == 50 * 4 * 4


def test_every_rung_is_a_worker_and_each_phase_may_have_one_more() -> None:
    shares = ShareConfig(prefill=0.6, ladder=(0.8, 1.0), decode_ladder=())
    assert shares.max_num_workers == (3 + 1) + (1 + 1)


def test_summary_says_what_memory_is_for() -> None:
    budget = Budget(available_bytes=GIB)
    config = EngineConfig(model=ModelConfig(path="/model"))
    memory = plan_memory(
        model(), config, eos_token_ids=(), budget=budget, default_dtype=None, default_page_size=16
    )
    tokens = (memory.layout.num_pages - 1) * 16
    assert f"of KV pages for {tokens} tokens; 1.00 GiB" in summary(memory, budget)


def test_too_little_memory_says_how_that_came_about() -> None:
    budget = Budget(available_bytes=100, detail="0.9 of 80 GiB, less 79 GiB in use")
    config = EngineConfig(model=ModelConfig(path="/model"))
    with pytest.raises(StartupError, match=r"are available \(0\.9 of 80 GiB, less 79 GiB in use\)"):
        plan_memory(
            model(),
            config,
            eos_token_ids=(),
            budget=budget,
            default_dtype=None,
            default_page_size=16,
        )


def test_memory_that_is_not_there() -> None:
    with pytest.raises(
        StartupError, match=r"weights need 0\.06 GiB as float32, but only 0\.05 GiB"
    ):
        plan(model(vocab_size=10**6), available_bytes=GIB // 20)
    with pytest.raises(StartupError, match=r"lower kv_cache_memory_bytes"):
        plan(memory_bytes=GIB)


@given(
    available_bytes=st.integers(0, GIB),
    memory_bytes=st.none() | st.integers(1, GIB),
    max_num_seqs=st.integers(1, 64),
    max_model_len=st.none() | st.integers(2, 1000),
    pool_takes_rest=st.booleans(),
)
def test_what_is_planned_fits(
    available_bytes: int,
    memory_bytes: int | None,
    max_num_seqs: int,
    max_model_len: int | None,
    pool_takes_rest: bool,
) -> None:
    try:
        memory = plan(
            available_bytes=available_bytes,
            memory_bytes=memory_bytes,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            pool_takes_rest=pool_takes_rest,
        )
    except StartupError:
        return
    layout = memory.layout
    assert memory.weights.num_bytes + memory.state.num_bytes <= available_bytes
    assert (layout.num_pages - 1) * layout.page_size >= layout.max_model_len
    used = memory.weights.num_bytes + memory.state.num_bytes
    if memory_bytes is None and pool_takes_rest:
        rounding = layout.kv_bytes / 64
        assert available_bytes - used < PAGE_BYTES + 8 * ALIGNMENT + rounding
    elif memory_bytes is None:
        assert layout.num_pages - 1 <= max_num_seqs * math.ceil(layout.max_model_len / 16)
    else:
        assert memory_bytes - PAGE_BYTES < layout.kv_bytes <= memory_bytes


def test_pool_that_takes_the_rest_has_the_same_size_when_a_little_less_is_free() -> None:
    """Programs are compiled for its size."""
    sizes = {
        plan(available_bytes=GIB - used, pool_takes_rest=True).layout.num_pages
        for used in range(0, GIB // 200, GIB // 2000)
    }
    assert len(sizes) <= 2


def test_rounding_never_takes_the_room_of_a_full_request() -> None:
    spec = model(max_model_len=16 * 2000 - 1)
    least = 1 + 2000

    def num_pages(available_bytes: int) -> int:
        return plan(spec, available_bytes=available_bytes, pool_takes_rest=True).layout.num_pages

    available = next(
        size for size in range(least * PAGE_BYTES, GIB, PAGE_BYTES) if _fits(num_pages, size)
    )
    assert num_pages(available) == least
    assert num_pages(available + 40 * PAGE_BYTES) == 2016 + 16


def _fits(num_pages: Callable[[int], int], available_bytes: int) -> bool:
    try:
        num_pages(available_bytes)
    except StartupError:
        return False
    return True
