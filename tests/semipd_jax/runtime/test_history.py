"""Cached prefixes: steps that compute only the rest give the tokens of steps that compute all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_cases import (
    PAGE_SIZE,
    columns,
    decode_message,
    dense_greedy,
    prefill_message,
    tiny_layout,
    tiny_model,
    zero_state,
)

from semipd_jax.messages import History
from semipd_jax.runtime.buckets import Bucket
from semipd_jax.runtime.compile import CompileCounter
from semipd_jax.runtime.history import compile_restore, pack_history
from semipd_jax.runtime.runner import StepRunner
from semipd_jax.runtime.state import SharedState

SPEC, GRAPHDEF, PARAMS = tiny_model()
LAYOUT = tiny_layout(SPEC)
LENGTH, CACHED = 41, 2 * PAGE_SIZE
PENALISED = {"repetition_penalty": 5.0, "frequency_penalty": 1.0, "prompt_len": LENGTH}


@pytest.fixture(scope="module")
def prefill():
    return StepRunner(
        GRAPHDEF,
        PARAMS,
        zero_state(SPEC, LAYOUT),
        {"prefill": (Bucket(64, 2, 7, 4, 3),)},
        platform="cpu",
    )


@pytest.fixture(scope="module")
def prompt():
    """One whose most likely next token is among the cached ones, so that penalties forbid it."""
    rng = np.random.default_rng(0)
    while True:
        tokens = rng.integers(2, SPEC.vocab_size, LENGTH).tolist()
        (likely,) = dense_greedy(tokens, 1)
        if likely in tokens[:CACHED] and likely not in tokens[CACHED:]:
            return tokens


def run(runner, message):
    return np.frombuffer(runner.dispatch(message).wait()[0], np.int32).tolist()


def test_only_the_row_is_written():
    before = np.arange(5 * 8, dtype=np.int32).reshape(5, 8)
    history = History(3, np.array([9, 8, 7], np.int32).tobytes())
    tokens = jax.ShapeDtypeStruct(before.shape, jnp.int32)
    restore = compile_restore(SharedState(layers=[], tokens=tokens), "cpu")
    after = np.array(restore(jnp.asarray(before), pack_history(history, 8)))
    assert after[3, :3].tolist() == [9, 8, 7]
    others = [0, 1, 2, 4]
    assert np.array_equal(after[others], before[others])


def test_the_rest_after_a_cached_prefix_is_sampled_like_the_whole_prompt(prefill, prompt):
    """With penalties, which tell whether the cached tokens are known. Nothing is compiled."""
    table = columns(1, **PENALISED)
    counter = CompileCounter()
    whole = run(prefill, prefill_message([(1, [5, 6, 7], prompt, 0, LENGTH, True)], sampling=table))
    rest = [(2, [5, 6, 8], prompt, CACHED, LENGTH, True)]
    without = run(prefill, prefill_message(rest, sampling=table))
    with_history = prefill_message(rest, sampling=table, history=[(2, prompt[:CACHED])])
    assert run(prefill, with_history) == whole
    assert without != whole, "the penalties do not depend on the cached tokens"
    tokens = np.array(prefill._state.tokens)
    assert tokens[2, : LENGTH + 1].tolist() == tokens[1, : LENGTH + 1].tolist()
    assert run(prefill, with_history) == whole, "a step that runs again gives another token"
    assert counter.count == 0


def test_decode_goes_on_from_a_cached_prefix(prefill):
    """Penalties of later tokens count the cached ones too."""
    state = jax.tree.map(lambda a: jnp.asarray(np.array(a)), prefill._state)
    buckets = {"decode": (Bucket(2, 2, 7, 4, 3),)}
    decode = StepRunner(GRAPHDEF, PARAMS, state, buckets, platform="cpu")
    table = columns(2, **PENALISED)
    generated = []
    for end in range(LENGTH + 1, LENGTH + 8):
        message = decode_message([(1, [5, 6, 7, 9], end), (2, [5, 6, 8, 10], end)], sampling=table)
        generated.append(run(decode, message))
    assert all(a == b for a, b in generated), generated
