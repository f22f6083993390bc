"""The runner of a worker: every bucket, no compiles, state at its address."""

import jax
import msgspec
import numpy as np
import pytest
from step_cases import (
    columns,
    decode_message,
    int32,
    packed_mask,
    prefill_message,
    tiny_layout,
    tiny_model,
    token_masks,
    zero_state,
)

from semipd_jax.messages import LogitBias, MixedStep
from semipd_jax.runtime.buckets import Bucket, MixedBucket
from semipd_jax.runtime.compile import CompileCounter
from semipd_jax.runtime.runner import StepRunner
from semipd_jax.storage.manifest import SharingError

SPEC, GRAPHDEF, PARAMS = tiny_model()
LAYOUT = tiny_layout(SPEC)
BUCKETS = {
    "prefill": (Bucket(32, 4, 7, 8, 3),),
    "decode": (Bucket(1, 1, 7, 8, 3), Bucket(4, 4, 7, 8, 3)),
    "mixed": (
        MixedBucket(Bucket(1, 1, 7, 8, 3), Bucket(32, 4, 7, 8, 3)),
        MixedBucket(Bucket(4, 4, 7, 8, 3), Bucket(32, 4, 7, 8, 3)),
    ),
}


@pytest.fixture(scope="module", params=["prefill", "decode", "mixed"])
def kind_runner(request):
    progress = []
    runner = StepRunner(
        GRAPHDEF,
        PARAMS,
        zero_state(SPEC, LAYOUT),
        {request.param: BUCKETS[request.param]},
        platform="cpu",
        on_progress=progress.append,
    )
    assert progress == list(range(len(BUCKETS[request.param]) + 1))
    return request.param, runner


def step_of(kind, num_rows, *, sampling=None, bias=None, masks=None):
    """A mixed step has one chunk beside the rows that decode; with masks, it has one too."""
    pages = [[1 + i] for i in range(num_rows)]
    rows = [(1 + i, pages[i], 5 + i) for i in range(num_rows)]
    chunks = [(1 + i, pages[i], [3] * 7, 0, 3 + i, True) for i in range(num_rows)]
    allowed = None if masks is None else token_masks(masks)
    if kind == "prefill":
        message = prefill_message(chunks, sampling=sampling)
        return msgspec.structs.replace(message, masks=allowed)
    decode = decode_message(rows, sampling=sampling, bias=bias)
    decode = msgspec.structs.replace(decode, masks=allowed)
    if kind == "decode":
        return decode
    prefill = prefill_message([(8, [9], [3] * 7, 0, 7, True)], sampling=columns(1))
    if masks is not None:
        prefill = msgspec.structs.replace(prefill, masks=token_masks({0: packed_mask([77], 3)}))
    return MixedStep(decode, prefill)


EVERYTHING = {
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "num_logprobs": 3,
}


def test_no_step_compiles_anything_whatever_its_size_and_features(kind_runner):
    kind, runner = kind_runner
    counter = CompileCounter()
    bias = LogitBias(width=1, token_ids=int32([4] * 3), values=np.ones(3, np.float32).tobytes())
    for num_rows in (1, 2, 3, 4):
        table = columns(num_rows, **EVERYTHING)
        for kwargs in ({}, {"sampling": table}):
            token_ids, logprobs = runner.dispatch(step_of(kind, num_rows, **kwargs)).wait()
            assert len(token_ids) == 4 * (num_rows + (kind == "mixed"))
            assert (logprobs is not None) == bool(kwargs)
    runner.dispatch(step_of(kind, 3, bias=bias)).wait()
    masks = {0: packed_mask([5], 3), 2: packed_mask([64, 95], 3)}
    token_ids, _ = runner.dispatch(step_of(kind, 3, masks=masks)).wait()
    chosen = np.frombuffer(token_ids, np.int32)
    assert chosen[0] == 5
    assert chosen[2] in (64, 95)
    assert chosen[3:].tolist() == [77] * (kind == "mixed")
    assert counter.count == 0


def test_steps_may_be_dispatched_before_earlier_ones_end(kind_runner):
    kind, runner = kind_runner
    alone = [runner.dispatch(step_of(kind, n)).wait()[0] for n in (1, 2)]
    queued = [runner.dispatch(step_of(kind, n)) for n in (1, 2)]
    assert [step.wait()[0] for step in queued] == alone


def test_state_that_leaves_its_memory_is_noticed(kind_runner):
    """A live NumPy view of the state makes XLA copy it instead of writing in place."""
    kind, runner = kind_runner
    views = [np.asarray(a) for a in jax.tree.leaves(runner._state)]
    with pytest.raises(SharingError, match="no longer in the shared region"):
        runner.dispatch(step_of(kind, 1))
    assert len(views) == 5
