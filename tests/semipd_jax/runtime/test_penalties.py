import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import history, sampling
from transformers import RepetitionPenaltyLogitsProcessor

from semipd_jax.runtime import penalties

V = 50


def penalise(logits, row_sampling, tokens, rows, context_lens):
    return np.asarray(
        jax.jit(penalties.penalise)(
            jnp.asarray(logits),
            row_sampling,
            tokens,
            jnp.asarray(rows, jnp.int32),
            jnp.asarray(context_lens, jnp.int32),
        )
    )


def openai(logits, output, presence, frequency):
    counts = np.bincount(output, minlength=V)
    return logits - frequency * counts - presence * (counts > 0)


@given(
    seed=st.integers(0, 2**32 - 1),
    lens=st.lists(st.integers(1, 600), min_size=2, max_size=4),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
)
@settings(max_examples=20)
def test_equals_transformers_and_openai(seed, lens, repetition):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, V, n) for n in lens]
    prompt_lens = [int(rng.integers(0, n + 1)) for n in lens]
    logits = rng.normal(size=(len(lens), V)).astype(np.float32) * 4
    presence, frequency = rng.uniform(-2, 2, (2, len(lens)))
    got = penalise(
        logits,
        sampling(
            len(lens),
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            prompt_len=prompt_lens,
        ),
        history(*rows),
        1 + np.arange(len(lens)),
        lens,
    )
    for i, row in enumerate(rows):
        processor = RepetitionPenaltyLogitsProcessor(repetition)
        repeated = processor(torch.tensor(row[None]), torch.tensor(logits[i : i + 1])).numpy()[0]
        expected = openai(repeated, row[prompt_lens[i] :], presence[i], frequency[i])
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-4)


def test_history_ends_at_the_context_length():
    logits = np.ones((1, V), np.float32)
    got = penalise(logits, sampling(1, presence_penalty=1.0), history([3, 4, 5]), [1], [2])
    assert sorted(np.flatnonzero(got[0] == 0)) == [3, 4]


def test_rows_without_penalties_are_untouched():
    logits = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32)
    tokens = history([1, 2, 3], [1, 2, 3])
    got = penalise(logits, sampling(2, frequency_penalty=[0.0, 1.0]), tokens, [1, 2], [3, 3])
    np.testing.assert_array_equal(got[0], logits[0])
    assert (got[1] != logits[1]).sum() == 3


def test_bias_adds_and_forbids():
    logits = np.zeros((2, V), np.float32)
    row_sampling = sampling(2, bias=[{4: 2.5, V - 1: -np.inf}, {}])
    got = np.asarray(penalties.add_bias(jnp.asarray(logits), row_sampling))
    assert got[0, 4] == 2.5
    assert got[0, V - 1] == -np.inf
    assert np.count_nonzero(got) == 2
