import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from step_cases import history, packed_mask, sampling
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from semipd_jax.request import MAX_LOGPROBS
from semipd_jax.runtime.sampling import sample

V = 300
NO_HISTORY = history([])

jitted_sample = jax.jit(sample)


def run(logits, row_sampling, *, tokens=NO_HISTORY, rows=None, context_lens=None):
    num_rows = len(logits)
    return jitted_sample(
        jnp.asarray(logits),
        row_sampling,
        tokens,
        jnp.zeros(num_rows, jnp.int32) if rows is None else jnp.asarray(rows, jnp.int32),
        jnp.ones(num_rows, jnp.int32)
        if context_lens is None
        else jnp.asarray(context_lens, jnp.int32),
    )


def random_logits(seed, num_rows, size=V):
    return np.random.default_rng(seed).normal(size=(num_rows, size)).astype(np.float32) * 3


def test_temperature_zero_is_argmax_whatever_else_is_set():
    logits = random_logits(0, 4)
    out = run(logits, sampling(4, temperature=0.0, top_k=5, top_p=0.1, min_p=0.5, seed=9))
    np.testing.assert_array_equal(out.token_ids, logits.argmax(axis=1))


def test_greedy_rows_beside_random_ones():
    logits = random_logits(1, 64)
    temperature = np.where(np.arange(64) % 2, 1.5, 0.0)
    chosen = np.asarray(run(logits, sampling(64, temperature=temperature)).token_ids)
    np.testing.assert_array_equal(chosen[::2], logits[::2].argmax(axis=1))
    assert (chosen[1::2] != logits[1::2].argmax(axis=1)).any()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers_warpers(params):
    num_draws = 20_000
    logits = random_logits(2, 1)
    warpers = [TemperatureLogitsWarper(params["temperature"])]
    for name, warper in (
        ("min_p", MinPLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        warpers += [warper(params[name])] if name in params else []
    warped = LogitsProcessorList(warpers)(None, torch.tensor(logits, dtype=torch.float64))
    expected = torch.softmax(warped[0], dim=0).numpy() * num_draws
    out = run(
        np.broadcast_to(logits, (num_draws, V)),
        sampling(num_draws, seed=np.arange(num_draws), **params),
    )
    counts = np.bincount(out.token_ids, minlength=V)
    assert not counts[expected == 0].any()
    rare = (expected > 0) & (expected < 5)
    observed = np.append(counts[expected >= 5], counts[rare].sum())
    wanted = np.append(expected[expected >= 5], expected[rare].sum())
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


def test_positions_of_one_seed_follow_the_distribution():
    num_draws = 20_000
    probs = np.array([0.5, 0.25, 0.15, 0.1])
    logits = np.broadcast_to(np.log(probs).astype(np.float32), (num_draws, 4))
    out = run(
        logits,
        sampling(num_draws, temperature=1.0, seed=5),
        context_lens=np.arange(num_draws),
    )
    counts = np.bincount(out.token_ids, minlength=4)
    assert stats.chisquare(counts, probs * num_draws).pvalue > 1e-4


def test_token_depends_neither_on_row_nor_on_batch():
    """The same rows, alone, shuffled, and among others that use every feature."""
    num_rows = 24
    rng = np.random.default_rng(3)
    logits = random_logits(3, num_rows)
    columns = {
        "temperature": rng.choice([0.0, 0.8, 1.7], num_rows),
        "top_k": rng.choice([0, 4, 100], num_rows),
        "top_p": rng.choice([1.0, 0.9, 0.3], num_rows),
        "min_p": rng.choice([0.0, 0.02], num_rows),
        "repetition_penalty": rng.choice([1.0, 1.4], num_rows),
        "seed": rng.integers(0, 2**32, num_rows, np.uint32),
        "num_logprobs": rng.choice([-1, 0, 5], num_rows),
    }
    context_lens = rng.integers(1, 40, num_rows)
    tokens = history(*(rng.integers(0, V, 40) for _ in range(num_rows)))

    def chosen(which):
        return np.asarray(
            run(
                logits[which],
                sampling(len(which), **{name: column[which] for name, column in columns.items()}),
                tokens=tokens,
                rows=1 + which,
                context_lens=context_lens[which],
            ).token_ids
        )

    everything = chosen(np.arange(num_rows))
    shuffled = rng.permutation(num_rows)
    np.testing.assert_array_equal(chosen(shuffled), everything[shuffled])
    for size in (1, 8):
        part = rng.permutation(num_rows)[:size]
        np.testing.assert_array_equal(chosen(part), everything[part])


def test_bias_and_penalties_change_the_choice_before_temperature():
    logits = np.zeros((3, V), np.float32)
    logits[:, 10], logits[:, 20] = 5.0, 4.0
    row_sampling = sampling(
        3, bias=[{20: 2.0}, {10: -np.inf}, {}], presence_penalty=[0.0, 0.0, 1.5]
    )
    out = run(logits, row_sampling, tokens=history([10]), rows=[1, 1, 1], context_lens=[1, 1, 1])
    assert out.token_ids.tolist() == [20, 20, 20]


def test_logprobs_are_of_the_models_own_logits():
    logits = random_logits(4, 2)
    out = run(
        logits,
        sampling(2, temperature=[0.0, 1.5], top_k=3, num_logprobs=[2, -1], bias=[{7: 100.0}, {}]),
    )
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=1)
    assert out.token_ids[0] == 7
    chosen = expected[[0, 1], out.token_ids.tolist()]
    np.testing.assert_allclose(out.logprobs, chosen, atol=1e-5)
    top = torch.topk(expected, MAX_LOGPROBS)
    np.testing.assert_array_equal(out.top_ids, top.indices)
    np.testing.assert_allclose(out.top_logprobs, top.values, atol=1e-5)


def test_vocabulary_smaller_than_the_number_of_logprobs():
    logits = random_logits(5, 1, size=6)
    out = run(logits, sampling(1, num_logprobs=20))
    assert out.top_ids.shape == (1, MAX_LOGPROBS)
    np.testing.assert_array_equal(out.top_ids[0, :6], np.argsort(-logits[0]))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.3},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 2.0, "min_p": 0.2, "top_k": 500},
    ],
)
def test_a_mask_is_as_if_other_tokens_had_no_probability_and_touches_no_other_row(params):
    rng = np.random.default_rng(7)
    logits = random_logits(7, 64)
    seed = np.arange(64, dtype=np.uint32)
    allowed = [np.sort(rng.choice(V, 1 + i % 9, replace=False)) for i in range(64)]
    has_mask = np.arange(64) % 3 != 0
    masks = [packed_mask(a, 10) if on else None for a, on in zip(allowed, has_mask, strict=True)]
    masked = run(logits, sampling(64, masks=masks, seed=seed, num_logprobs=2, **params))

    hidden = np.full_like(logits, -np.inf)
    for row, ids in enumerate(allowed):
        hidden[row, ids] = logits[row, ids]
    expected = np.where(has_mask[:, None], hidden, logits)
    plain = run(expected, sampling(64, seed=seed, **params))
    np.testing.assert_array_equal(masked.token_ids, plain.token_ids)
    chosen = np.asarray(masked.token_ids)
    assert all(chosen[i] in allowed[i] for i in np.flatnonzero(has_mask))
    of_model = run(logits, sampling(64, num_logprobs=2))
    np.testing.assert_allclose(masked.top_logprobs, of_model.top_logprobs, rtol=1e-6)
