"""The whole engine against Hugging Face transformers on the same checkpoints, in float32."""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CASES, write_checkpoint
from hf_reference import Reference

from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine, Engine


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL_DIR)


@pytest.fixture(scope="module")
def prompts() -> dict[int, list[int]]:
    """Random prompts by length: one token, around page and chunk edges, several chunks."""
    rng = random.Random(0)
    lengths = (1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300, 513)
    return {n: [rng.randrange(100, 4000) for _ in range(n)] for n in lengths}


def test_greedy_tokens_and_logprobs_alone(demo_engine: Engine, reference, prompts):
    for prompt in prompts.values():
        tokens, logprobs = reference.greedy(prompt, 20)
        result = demo_engine.generate(
            prompt, temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=5
        )
        assert list(result.token_ids) == tokens, f"prompt of {len(prompt)} tokens"
        np.testing.assert_allclose([p.logprob for p in result.logprobs], logprobs, atol=1e-3)
        for entry in result.logprobs:
            assert entry.top[0] == (entry.token_id, entry.logprob)
            assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)


def test_greedy_tokens_in_a_mixed_batch_with_staggered_arrivals(compile_cache, reference, prompts):
    rng = random.Random(1)
    jobs = [(rng.choice(list(prompts.values())), rng.randint(1, 40)) for _ in range(32)]

    async def run() -> list[tuple[int, ...]]:
        async with AsyncEngine(
            str(MODEL_DIR),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            compile_cache_dir=compile_cache,
        ) as engine:

            async def one(i: int, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
                await asyncio.sleep(0.02 * i)
                result = await engine.complete(
                    prompt, temperature=0.0, max_tokens=num_tokens, ignore_eos=True
                )
                return result.token_ids

            results = await asyncio.gather(*(one(i, *job) for i, job in enumerate(jobs)))
            stats = await engine.stats()
            assert stats.num_compiles == 0, "something was compiled after warm-up"
            assert stats.num_free_pages == stats.num_pages
            return results

    for (prompt, num_tokens), result in zip(jobs, asyncio.run(run()), strict=True):
        assert list(result) == reference.greedy(prompt, num_tokens)[0]


@pytest.mark.parametrize("name", CASES)
def test_every_family(name: str, tmp_path: Path, compile_cache: str):
    family, overrides = CASES[name]
    directory = write_checkpoint(tmp_path / "model", family, num_hidden_layers=2, **overrides)
    reference = Reference(directory)
    rng = random.Random(2)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (1, 16, 33, 75)]
    with Engine(
        str(directory),
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=128,
        compile_cache_dir=compile_cache,
    ) as engine:
        results = engine.generate_many(
            prompts, temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0
        )
    for prompt, result in zip(prompts, results, strict=True):
        tokens, logprobs = reference.greedy(prompt, 24)
        assert list(result.token_ids) == tokens
        np.testing.assert_allclose([p.logprob for p in result.logprobs], logprobs, atol=1e-3)
