"""Runs a worker's compiled steps over shared state: dispatch now, collect later.

Steps run on the device in the order of dispatch, because each takes the state that the one before
it returns. Nothing is compiled here, and no eager jax operation runs: host work is NumPy.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from semipd_jax.config import Platform
from semipd_jax.messages import (
    ROW_SAMPLING,
    DecodeStep,
    History,
    MixedStep,
    PrefillStep,
    StepLogprobs,
    TokenMasks,
    ToWorker,
    parts,
)
from semipd_jax.models import module
from semipd_jax.runtime.batch import pack_biases, pack_masks, pack_step_masks
from semipd_jax.runtime.buckets import Kind, StepBucket, choose
from semipd_jax.runtime.compile import STEP_KINDS, compile_step
from semipd_jax.runtime.history import compile_restore, pack_history
from semipd_jax.runtime.sampling import StepOutput
from semipd_jax.runtime.state import SharedState
from semipd_jax.storage.arrays import check_result

type _Program = tuple[Kind, Any]
"""A kind of step and a bucket."""

_KINDS: Final[Mapping[type, Kind]] = {
    PrefillStep: "prefill",
    DecodeStep: "decode",
    MixedStep: "mixed",
}


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step on its way through the device.

    Attributes:
      rows: those of the output that are not padding.
    """

    step_id: int
    rows: Int[np.ndarray, " B"]
    wants_logprobs: bool
    output: StepOutput
    dispatched_s: float

    def wait(self) -> tuple[bytes, StepLogprobs | None]:
        """The sampled token ids (int32) and log-probabilities, when all that the step writes is
        there: an execution's results become ready together."""
        token_ids = np.asarray(self.output.token_ids)[self.rows].tobytes()
        if not self.wants_logprobs:
            return token_ids, None
        logprobs, top_ids, top_logprobs = (
            np.asarray(x)[self.rows].tobytes()
            for x in (self.output.logprobs, self.output.top_ids, self.output.top_logprobs)
        )
        return token_ids, StepLogprobs(sampled=logprobs, top_ids=top_ids, top_logprobs=top_logprobs)


class StepRunner:
    """A worker's programs, the parameters, and the state that they hand on.

    Every program has run once, on padding, which writes nothing.

    Args:
      params: parameter tree over shared memory.
      state: arrays over shared memory; this object owns them from now on.
      on_progress: told how many buckets are ready, from 0 to all.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: module.Params,
        state: SharedState,
        buckets: Mapping[Kind, tuple[StepBucket, ...]],
        *,
        platform: Platform,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._buckets = buckets
        programs: list[_Program] = [
            (kind, bucket) for kind, some in buckets.items() for bucket in some
        ]
        self._params = jax.tree.leaves(params)
        self._state = state
        self._addresses = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state)]
        self._no_bias = {
            bucket: jax.device_put(pack_biases([None] * len(bucket.parts), bucket))
            for _, bucket in programs
        }
        self._no_masks = {
            bucket: jax.device_put([pack_masks(None, part) for part in bucket.parts])
            for _, bucket in programs
        }
        # Before any threads: two that iterate over a device list, as compiling does, end with
        # signal 11 in jax 0.11.2 if none did before (nanobind still makes the iterator's type).
        self._restore_history = compile_restore(state, platform)
        self._programs = _compile_all(
            lambda program: compile_step(program[0], graphdef, params, state, program[1], platform),
            programs,
            on_progress,
        )
        self._restore(History(row=0, token_ids=b""))
        for kind, bucket in programs:
            padding, no_bias = STEP_KINDS[kind].padding(bucket), self._no_bias[bucket]
            no_masks = [None] * len(bucket.parts)
            jax.block_until_ready(self._execute((kind, bucket), padding, no_bias, no_masks))

    def dispatch(self, step: ToWorker) -> PendingStep:
        """Starts a step and returns at once.

        Raises ValueError if no bucket holds the step, and SharingError if the state left shared
        memory; both are the end of this runner.
        """
        kind, own = _KINDS[type(step)], parts(step)
        bucket = choose(self._buckets[kind], *map(_size, own))
        packed = STEP_KINDS[kind].pack(step, bucket)
        biases, masks = [part.bias for part in own], [part.masks for part in own]
        bias = pack_biases(biases, bucket) if any(biases) else self._no_bias[bucket]
        started_s = time.monotonic()
        for part in own:
            for history in part.history if isinstance(part, PrefillStep) else ():
                self._restore(history)
        output = self._execute((kind, bucket), packed, bias, masks)
        rows, wants_logprobs = _real_rows(own, bucket), any(map(_wants_logprobs, own))
        return PendingStep(step.step_id, rows, wants_logprobs, output, started_s)

    def _restore(self, history: History) -> None:
        tokens = self._state.tokens
        tokens = self._restore_history(tokens, pack_history(history, tokens.shape[1]))
        self._keep(replace(self._state, tokens=tokens))

    def _execute(
        self,
        program: _Program,
        packed: np.ndarray,
        bias: np.ndarray | Array,
        masks: Sequence[TokenMasks | None],
    ) -> StepOutput:
        """`masks`: of each part of the step."""
        arrays = pack_step_masks(masks, program[1], self._no_masks[program[1]])
        run = self._programs[program]
        output, state = run(self._params, self._state, packed, bias, arrays)
        self._keep(state)
        return output

    def _keep(self, state: SharedState) -> None:
        self._state = state
        for array, address in zip(jax.tree.leaves(state), self._addresses, strict=True):
            check_result(array, address)


def _compile_all(
    compile_one: Callable[[_Program], jax.stages.Compiled],
    wanted: list[_Program],
    on_progress: Callable[[int], None],
) -> dict[_Program, jax.stages.Compiled]:
    """Compiles every program, on as many threads as this process has cores."""
    on_progress(0)
    programs: dict[_Program, jax.stages.Compiled] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "compile") as pool:
        pending = {pool.submit(compile_one, program): program for program in wanted}
        try:
            for future in as_completed(pending):
                programs[pending[future]] = future.result()
                on_progress(len(programs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return programs


def _size(step: PrefillStep | DecodeStep) -> tuple[int, int]:
    """(tokens, rows)."""
    num_rows = len(step.rows) // 4
    return (len(step.token_ids) // 4 if isinstance(step, PrefillStep) else num_rows), num_rows


def _real_rows(
    steps: tuple[PrefillStep | DecodeStep, ...], bucket: StepBucket
) -> Int[np.ndarray, " B"]:
    """Rows of the output that a step's rows have got."""
    starts = accumulate((part.num_rows for part in bucket.parts), initial=0)
    return np.concatenate(
        [start + np.arange(len(s.rows) // 4) for start, s in zip(starts, steps, strict=False)]
    )


def _wants_logprobs(step: PrefillStep | DecodeStep) -> bool:
    return bool((np.frombuffer(step.sampling, ROW_SAMPLING)["num_logprobs"] >= 0).any())
