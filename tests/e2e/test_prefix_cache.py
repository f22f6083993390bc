"""Conversations on a real engine: what was computed before is found, and changes no token."""

import random
from collections.abc import Iterator

import pytest
from hf_reference import Reference

from benchmarks.processes import engine_processes
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import Engine

SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module", params=[True, False], ids=["cache", "no-cache"])
def engine(request, compile_cache) -> Iterator[Engine]:
    with Engine(
        str(MODEL_DIR),
        enable_prefix_caching=request.param,
        compile_cache_dir=compile_cache,
        **SMALL,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL_DIR)


@pytest.fixture
def is_caching(request) -> bool:
    return request.node.callspec.params["engine"]


def random_tokens(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 4000) for _ in range(length)]


def full_pages(num_tokens: int, page_size: int) -> int:
    return num_tokens // page_size * page_size


def test_turns_of_a_conversation_equal_transformers(engine: Engine, is_caching: bool, reference):
    page_size = engine.layout.page_size
    before = engine.stats()
    conversation: list[int] = []
    num_computed, num_cached = 0, 0
    for turn in range(4):
        conversation += random_tokens(turn, 37)
        result = engine.generate(conversation, max_tokens=20, **GREEDY)
        assert list(result.token_ids) == reference.greedy(conversation, 20)[0]
        expected = full_pages(num_computed, page_size) if is_caching else 0
        assert result.usage.cached_tokens == expected
        num_cached += expected
        conversation += result.token_ids
        num_computed = len(conversation) - 1  # the last token was never an input
    after = engine.stats()
    assert after.prefix_cache_hits - before.prefix_cache_hits == num_cached
    assert after.num_free_pages == after.num_pages
    assert (after.num_cached_pages > 0) == is_caching
    assert after.num_compiles == 0


def test_requests_that_share_a_prompt_at_once_equal_transformers(engine: Engine, reference):
    system = random_tokens(10, 70)
    prompts = [[*system, *random_tokens(11 + i, 1 + 9 * i)] for i in range(6)]
    engine.generate(system, max_tokens=1)
    for prompt, result in zip(
        prompts, engine.generate_many(prompts, max_tokens=16, **GREEDY), strict=True
    ):
        assert list(result.token_ids) == reference.greedy(prompt, 16)[0]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "random"]
)
def test_penalties_see_the_cached_tokens(engine: Engine, is_caching: bool, sampling):
    """Eight tokens are all that may come; four of them are in the cached part of the prompt, and a
    penalty that knows it prefers the others."""
    prompt = random_tokens(20, 40)
    wanted = [*prompt[:4], 50, 51, 52, 53]  # random tokens are larger
    options = {
        "max_tokens": 16,
        "ignore_eos": True,
        "logit_bias": dict.fromkeys(wanted, 50.0),
        "repetition_penalty": 2.0,
        **sampling,
    }
    salt = str(sampling)
    tokens = engine.generate(prompt, cache_salt=salt, **options)
    engine.generate(random_tokens(22, 80), max_tokens=1)  # its tokens take the place of the prompt
    cached = engine.generate(prompt, cache_salt=salt, **options)
    assert (cached.usage.cached_tokens > 0) == is_caching
    assert tokens.usage.cached_tokens == 0, "salts do not separate"
    assert set(cached.token_ids[:4]) == set(wanted[4:])
    assert cached.token_ids == tokens.token_ids


@pytest.mark.parametrize("engine", [True], indirect=True, ids=["cache"])
def test_a_worker_s_death_costs_no_cached_page_and_no_token(engine: Engine):
    prompt = random_tokens(30, 100)
    expected = engine.generate(prompt, max_tokens=60, **GREEDY).token_ids
    for role in ("prefill", "decode"):
        stream = engine.stream(prompt, max_tokens=60, **GREEDY)
        tokens: list[int] = []
        for event in stream:
            if not tokens and (worker := engine_processes().get(f"{role} worker 1.00")):
                worker.kill()
            tokens += getattr(event, "token_ids", ())
        assert tuple(tokens) == expected
    result = engine.generate(prompt, max_tokens=60, **GREEDY)
    assert result.token_ids == expected
    assert result.usage.cached_tokens > 0
