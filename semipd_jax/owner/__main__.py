"""`python -m semipd_jax.owner`: the memory owner, a child process of the launcher.

It reserves the memory, loads the weights, hands both to whoever asks, and keeps them alive. It runs
no kernel, imports no jax and takes no share of the compute, so nothing that happens to a worker
can take the memory with it.
"""

import contextlib
import logging
import select
from typing import Final

from tqdm import tqdm

from semipd_jax.child import Child, run_child
from semipd_jax.messages import MemoryLayout
from semipd_jax.models.checkpoint import Checkpoint, open_checkpoint
from semipd_jax.models.registry import load_spec
from semipd_jax.models.spec import ModelSpec
from semipd_jax.owner.plan import activation_bytes, plan_memory, summary
from semipd_jax.shares import backend as shares
from semipd_jax.storage.backend import Backend, Memory, Reservation, backend
from semipd_jax.storage.server import MemoryServer

_TICK_S: Final = 5.0
_log = logging.getLogger(__name__)


def main(child: Child) -> None:
    shares.abstain(child.spec.platform, child.spec.run_dir)
    storage = backend(child.spec.platform)
    with storage.open_memory() as memory:
        layout, regions = _reserve_and_load(child, memory, storage)
        if child.stopping.is_set():
            return
        with contextlib.closing(MemoryServer(child.spec.run_dir, regions)) as server:
            child.ready(layout=layout)
            while not child.stopping.is_set():
                if server in select.select([server, child], [], [], _TICK_S)[0]:
                    server.answer()


def _reserve_and_load(
    child: Child, memory: Memory, storage: Backend
) -> tuple[MemoryLayout, list[Reservation]]:
    config, model = child.spec.config, child.spec.config.model
    spec = load_spec(model.path)
    checkpoint = open_checkpoint(model.path, spec, model.load_format, model.seed)
    budget = memory.budget(
        config.cache.gpu_memory_utilization,
        config.max_num_workers,
        activation_bytes(spec, config),
    )
    plan = plan_memory(
        spec,
        config,
        eos_token_ids=checkpoint.eos_token_ids,
        budget=budget,
        default_dtype=storage.dtype,
        default_page_size=storage.page_size,
    )
    _log.info("%s", summary(plan, budget))
    weights, state = memory.reserve(plan.weights), memory.reserve(plan.state)
    _load_weights(child, spec, checkpoint, weights)
    return plan.layout, [weights, state]


def _load_weights(
    child: Child, spec: ModelSpec, checkpoint: Checkpoint, memory: Reservation
) -> None:
    """Reads every weight straight into shared memory. Leaves early if a stop is asked for."""
    done, total = 0, sum(entry.num_bytes for entry in memory.region.arrays)
    # `disable=None`: a bar only if standard error is a terminal.
    with tqdm(total=total, desc="load weights", unit="B", unit_scale=True, disable=None) as bar:
        for weight in spec.weights:
            if child.stopping.is_set():
                return
            with memory.writing(weight.path) as out:
                checkpoint.read(weight, out)
            bar.update(out.nbytes)
            done += out.nbytes
            child.progress("load weights", done, total, detail=weight.path)
    memory.finish()


if __name__ == "__main__":
    run_child(main)
