"""Steps are compiled ahead of time and checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from semipd_jax.config import Platform
from semipd_jax.models import module
from semipd_jax.runtime import batch
from semipd_jax.runtime.buckets import Kind, StepBucket
from semipd_jax.runtime.guard import check_in_place
from semipd_jax.runtime.sampling import StepOutput
from semipd_jax.runtime.state import SharedState
from semipd_jax.runtime.steps import decode_step, mixed_step, prefill_step

COMPILER_OPTIONS: Final[Mapping[Platform, Mapping[str, Any]]] = MappingProxyType(
    {
        "cpu": {"xla_backend_optimization_level": 1},
        "cuda": {
            "xla_gpu_enable_command_buffer": (
                "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
            )
        },
    }
)
"""On a CPU, LLVM's level 1 compiles a tenth faster than level 3, and its code is no slower.

On a GPU, CONDITIONAL and WHILE, off by default, let the sampler's branches and loops into the CUDA
graph of the step (as conditional nodes; driver 12.3 or later); outside, the host waits for each
predicate.
"""

_COMPILE_EVENT: Final = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True, slots=True)
class StepKind:
    """What the kinds of steps have each their own of."""

    step: Callable[[Any, SharedState, Any], tuple[StepOutput, SharedState]]
    pack: Callable[[Any, Any], np.ndarray]
    unpack: Callable[[Array, Array, batch.Masks, Any], Any]
    padding: Callable[[Any], np.ndarray]


STEP_KINDS: Final[Mapping[Kind, StepKind]] = MappingProxyType(
    {
        "prefill": StepKind(
            prefill_step, batch.pack_prefill, batch.unpack_prefill, batch.prefill_padding
        ),
        "decode": StepKind(
            decode_step, batch.pack_decode, batch.unpack_decode, batch.decode_padding
        ),
        "mixed": StepKind(mixed_step, batch.pack_mixed, batch.unpack_mixed, batch.mixed_padding),
    }
)


def compile_step(
    kind: Kind,
    graphdef: nnx.GraphDef,
    params: module.Params,
    state: SharedState,
    bucket: StepBucket,
    platform: Platform,
) -> jax.stages.Compiled:
    """The step of a kind for one bucket: (parameter leaves, state, batch words, biases, masks) →
    (output, state), with `state` donated.

    Raises SharingError if the program would not update `state` in place.

    Args:
      params, state: trees of arrays or `jax.ShapeDtypeStruct`s.
    """
    of_kind = STEP_KINDS[kind]
    no_bias = batch.pack_biases([None] * len(bucket.parts), bucket)
    leaves, tree = jax.tree.flatten(params)

    def step(
        leaves: list[Array],
        state: SharedState,
        packed: Int32[Array, " words"],
        bias: Int32[Array, "B 2 W"],
        masks: batch.Masks,
    ) -> tuple[StepOutput, SharedState]:
        model = module.merge(graphdef, jax.tree.unflatten(tree, leaves))
        return of_kind.step(model, state, of_kind.unpack(packed, bias, masks, bucket))

    compiled = (
        jax.jit(step, donate_argnames="state")
        .lower(
            leaves,
            state,
            jax.ShapeDtypeStruct(of_kind.padding(bucket).shape, jnp.int32),
            jax.ShapeDtypeStruct(no_bias.shape, jnp.int32),
            tuple(
                jax.ShapeDtypeStruct((count, part.mask_width), jnp.uint32)
                for part in bucket.parts
                for count in batch.mask_counts(part)
            ),
        )
        .compile(dict(COMPILER_OPTIONS[platform]))
    )
    check_in_place(compiled, state, bucket.num_tokens)
    return compiled


class CompileCounter:
    """Counts what this process compiles from now on, jax's own small programs included."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == _COMPILE_EVENT
