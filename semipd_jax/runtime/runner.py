"""Runs one phase's compiled steps over shared state: dispatch now, collect later.

Steps run on the device in the order of dispatch, because each takes the state that the one before
it returns. Nothing is compiled here, and no eager jax operation runs: host work is NumPy.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from semipd_jax.config import Platform
from semipd_jax.messages import (
    ROW_SAMPLING,
    DecodeStep,
    History,
    Phase,
    PrefillStep,
    StepLogprobs,
)
from semipd_jax.models import module
from semipd_jax.runtime.batch import pack_bias, pack_masks
from semipd_jax.runtime.buckets import Bucket, choose
from semipd_jax.runtime.compile import STEP_KINDS, compile_step
from semipd_jax.runtime.history import compile_restore, pack_history
from semipd_jax.runtime.sampling import StepOutput
from semipd_jax.runtime.state import SharedState
from semipd_jax.storage.arrays import check_result

type Step = PrefillStep | DecodeStep


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step on its way through the device."""

    step_id: int
    num_rows: int
    wants_logprobs: bool
    output: StepOutput
    dispatched_s: float

    def wait(self) -> tuple[bytes, StepLogprobs | None]:
        """The sampled token ids (int32) and log-probabilities, when all that the step writes is
        there: an execution's results become ready together."""
        token_ids = np.asarray(self.output.token_ids)[: self.num_rows].tobytes()
        if not self.wants_logprobs:
            return token_ids, None
        logprobs, top_ids, top_logprobs = (
            np.asarray(x)[: self.num_rows].tobytes()
            for x in (self.output.logprobs, self.output.top_ids, self.output.top_logprobs)
        )
        return token_ids, StepLogprobs(sampled=logprobs, top_ids=top_ids, top_logprobs=top_logprobs)


class StepRunner:
    """One phase's programs, the parameters, and the state that they hand on.

    Every program has run once, on padding, which writes nothing.

    Args:
      params: parameter tree over shared memory.
      state: arrays over shared memory; this object owns them from now on.
      on_progress: told how many buckets are ready, from 0 to all.
    """

    def __init__(
        self,
        phase: Phase,
        graphdef: nnx.GraphDef,
        params: module.Params,
        state: SharedState,
        buckets: tuple[Bucket, ...],
        *,
        platform: Platform,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._pack = STEP_KINDS[phase].pack
        self._buckets = buckets
        self._params = jax.tree.leaves(params)
        self._state = state
        self._addresses = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state)]
        self._no_bias = {b: jax.device_put(pack_bias(None, b)) for b in buckets}
        self._no_masks = {b: jax.device_put(pack_masks(None, b)) for b in buckets}
        self._programs = _compile_all(
            lambda bucket: compile_step(phase, graphdef, params, state, bucket, platform),
            buckets,
            on_progress,
        )
        self._restore_history = compile_restore(state, platform)
        self._restore(History(row=0, token_ids=b""))
        for bucket in buckets:
            padding = STEP_KINDS[phase].packing(bucket).padding
            jax.block_until_ready(self._execute(bucket, padding, self._no_bias[bucket], ()))

    def dispatch(self, step: Step) -> PendingStep:
        """Starts a step and returns at once.

        Raises ValueError if no bucket holds the step, and SharingError if the state left shared
        memory; both are the end of this runner.
        """
        num_rows = len(step.rows) // 4
        num_tokens = len(step.token_ids) // 4 if isinstance(step, PrefillStep) else num_rows
        bucket = choose(self._buckets, num_tokens, num_rows)
        packed = self._pack(step, bucket)
        bias = self._no_bias[bucket] if step.bias is None else pack_bias(step.bias, bucket)
        masks = () if step.masks is None else pack_masks(step.masks, bucket)
        started_s = time.monotonic()
        for history in step.history if isinstance(step, PrefillStep) else ():
            self._restore(history)
        output = self._execute(bucket, packed, bias, masks)
        return PendingStep(step.step_id, num_rows, _wants_logprobs(step), output, started_s)

    def _restore(self, history: History) -> None:
        tokens = self._state.tokens
        tokens = self._restore_history(tokens, pack_history(history, tokens.shape[1]))
        self._keep(replace(self._state, tokens=tokens))

    def _execute(
        self,
        bucket: Bucket,
        packed: np.ndarray,
        bias: np.ndarray | Array,
        masks: Sequence[np.ndarray],
    ) -> StepOutput:
        """`masks`: the first of the arrays; the rest are those that are there already."""
        all_masks = (*masks, *self._no_masks[bucket][len(masks) :])
        output, state = self._programs[bucket](self._params, self._state, packed, bias, all_masks)
        self._keep(state)
        return output

    def _keep(self, state: SharedState) -> None:
        self._state = state
        for array, address in zip(jax.tree.leaves(state), self._addresses, strict=True):
            check_result(array, address)


def _compile_all(
    compile_one: Callable[[Bucket], jax.stages.Compiled],
    buckets: tuple[Bucket, ...],
    on_progress: Callable[[int], None],
) -> dict[Bucket, jax.stages.Compiled]:
    """Compiles every bucket, on as many threads as this process has cores."""
    on_progress(0)
    programs: dict[Bucket, jax.stages.Compiled] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "compile") as pool:
        pending = {pool.submit(compile_one, bucket): bucket for bucket in buckets}
        try:
            for future in as_completed(pending):
                programs[pending[future]] = future.result()
                on_progress(len(programs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return programs


def _wants_logprobs(step: Step) -> bool:
    return bool((np.frombuffer(step.sampling, ROW_SAMPLING)["num_logprobs"] >= 0).any())
