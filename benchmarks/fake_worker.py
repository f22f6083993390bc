"""`python -m benchmarks.fake_worker`: a worker that computes nothing.

It answers each step after `STEP_S` seconds (an environment variable), or else at once. Tokens vary,
so that there is text to decode.
"""

import gc
import os
import time
from typing import Final

import numpy as np
from jaxtyping import Int32

from semipd_jax.child import Child, run_child
from semipd_jax.messages import (
    ROW_SAMPLING,
    DecodeStep,
    FromWorker,
    PrefillStep,
    StepDone,
    StepLogprobs,
    TokenMasks,
    ToWorker,
    WorkerReady,
)
from semipd_jax.request import MAX_LOGPROBS
from semipd_jax.transport.channels import WORKERS, Link

STEP_S: Final = "SEMIPD_FAKE_STEP_S"
_ROW_BYTES: Final = np.dtype(np.int32).itemsize
_TICK_S: Final = 0.1


def main(child: Child) -> None:
    spec, layout = child.spec, child.spec.layout
    assert layout is not None
    assert spec.lane is not None
    assert spec.share is not None
    worker_id, step_s = spec.extra["worker_id"], float(os.environ.get(STEP_S, "0"))
    gc.collect()
    gc.freeze()  # as the real one does
    link = Link[ToWorker, FromWorker](spec.run_dir, WORKERS, worker_id, ToWorker)
    link.send(WorkerReady(worker_id, spec.lane, spec.share))
    child.ready()
    while not child.stopping.is_set():
        step = link.receive(_TICK_S)
        if isinstance(step, PrefillStep | DecodeStep):
            if step_s:
                time.sleep(step_s)
            link.send(_reply(worker_id, step, layout.vocab_size))
    link.close()


def _reply(worker_id: str, step: PrefillStep | DecodeStep, vocab_size: int) -> StepDone:
    num_rows = len(step.rows) // _ROW_BYTES
    tokens = (np.arange(num_rows, dtype=np.int32) + step.step_id * 17) % vocab_size
    if step.masks is not None:
        _keep_to(step.masks, tokens)
    return StepDone(
        worker_id,
        step.step_id,
        tokens.tobytes(),
        device_s=0.0,
        num_compiles=0,
        logprobs=_logprobs(step, num_rows),
    )


def _keep_to(masks: TokenMasks, tokens: Int32[np.ndarray, " rows"]) -> None:
    """Gives constrained rows the first token that their masks allow."""
    places = np.frombuffer(masks.places, np.int32)
    words = np.frombuffer(masks.words, np.uint8).reshape(len(places), -1)
    tokens[places] = np.unpackbits(words, axis=1, bitorder="little").argmax(axis=1)


def _logprobs(step: PrefillStep | DecodeStep, num_rows: int) -> StepLogprobs | None:
    wanted = np.frombuffer(step.sampling, ROW_SAMPLING)["num_logprobs"]
    if (wanted < 0).all():
        return None
    zeros = np.zeros((num_rows, MAX_LOGPROBS), np.float32)
    return StepLogprobs(zeros[:, 0].tobytes(), zeros.tobytes(), zeros.tobytes())


if __name__ == "__main__":
    run_child(main)
