"""`python -m semipd_jax.compile.child`: compiles one worker's programs for a described GPU.

It reads a `Job` from standard input and writes JSON lines: how many programs there will be, then a
`Compiled` for each. It ends when nobody can read them any more.
"""

import os
import select
import sys
import threading
import time

import jax
import msgspec

from semipd_jax.compile.described import Compiled, Job
from semipd_jax.errors import StartupError
from semipd_jax.messages import Progress
from semipd_jax.models import module
from semipd_jax.models.checkpoint import open_checkpoint
from semipd_jax.models.registry import load_spec
from semipd_jax.models.spec import ModelSpec
from semipd_jax.owner.plan import MemoryPlan, activation_bytes, plan_memory
from semipd_jax.runtime.buckets import Kind, StepBucket, lane_buckets
from semipd_jax.runtime.compile import compile_step
from semipd_jax.runtime.described_gpu import DescribedGpu
from semipd_jax.runtime.state import SharedState
from semipd_jax.storage.backend import backend
from semipd_jax.storage.budget import Budget
from semipd_jax.storage.cuda import CONTEXT_BYTES
from semipd_jax.storage.manifest import Region, SharingError


def main(job: Job) -> None:
    whole = DescribedGpu(job.gpu)
    num_sms = max(2 * round(job.share * whole.num_sms / 2), 2)  # MPS deals them in pairs
    gpu = DescribedGpu(job.gpu, num_sms=num_sms)
    spec = load_spec(job.config.model.path)
    plan = _plan(job, spec, whole.memory_bytes)
    buckets = lane_buckets(job.lane, plan.layout, job.config.scheduler)
    programs: list[tuple[Kind, StepBucket]] = [
        (kind, bucket) for kind, some in buckets.items() for bucket in some
    ]
    _say(Progress(stage="compile", done=0, total=len(programs)))
    for kind, bucket in programs:
        started_s = time.monotonic()
        temp_bytes, problem = 0, None
        try:
            compiled = _compile(kind, bucket, spec, plan, gpu)
            if (memory := compiled.memory_analysis()) is not None:
                temp_bytes = memory.temp_size_in_bytes
        except (jax.errors.JaxRuntimeError, SharingError) as error:
            problem = str(error)
        _say(
            Compiled(
                lane=job.lane,
                share=job.share,
                num_sms=num_sms,
                num_tokens=bucket.num_tokens,
                num_rows=bucket.num_rows,
                seconds=time.monotonic() - started_s,
                temp_bytes=temp_bytes,
                problem=problem,
            )
        )


def _plan(job: Job, spec: ModelSpec, memory_bytes: int) -> MemoryPlan:
    """As the memory owner would make it on an empty device."""
    config, cuda = job.config, backend("cuda")
    each = CONTEXT_BYTES + activation_bytes(spec, config)
    usable = int(memory_bytes * config.cache.gpu_memory_utilization)
    available = usable - config.max_num_workers * each
    checkpoint = open_checkpoint(config.model.path, spec, "dummy", 0)
    return plan_memory(
        spec,
        config,
        eos_token_ids=checkpoint.eos_token_ids,
        budget=Budget(available_bytes=max(available, 0), pool_takes_rest=True),
        default_dtype=cuda.dtype,
        default_page_size=cuda.page_size,
    )


def _compile(
    kind: Kind, bucket: StepBucket, spec: ModelSpec, plan: MemoryPlan, gpu: DescribedGpu
) -> jax.stages.Compiled:
    graphdef, params = module.abstract_params(spec, plan.layout.dtype)
    state = module.nest(_abstract(plan.state))
    layers = [state["layers"][i] for i in range(spec.num_layers)]
    arguments = gpu.place(params), gpu.place(SharedState(layers=layers, tokens=state["tokens"]))
    with gpu.tracing():
        return compile_step(kind, graphdef, *arguments, bucket, "cuda")


def _abstract(region: Region) -> dict[str, jax.ShapeDtypeStruct]:
    return {e.path: jax.ShapeDtypeStruct(e.shape, e.dtype) for e in region.arrays}


def _say(message: Progress | Compiled) -> None:
    print(msgspec.json.encode(message).decode(), flush=True)


def _end_with_the_reader() -> None:
    """Ends the process, whatever it is doing, once the other end of standard output is closed."""
    output = select.poll()
    output.register(sys.stdout, 0)  # an error is told in any case
    output.poll()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_reader, name="lifeline", daemon=True).start()
    try:
        main(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
    except StartupError as error:
        sys.exit(str(error))
