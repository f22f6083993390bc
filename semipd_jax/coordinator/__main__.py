"""`python -m semipd_jax.coordinator`: a child process of the launcher."""

import logging
import time
from pathlib import Path
from typing import Any, Final

from semipd_jax.child import Child, run_child
from semipd_jax.config import LANES, EngineConfig, ModelConfig
from semipd_jax.coordinator.coordinator import Coordinator
from semipd_jax.coordinator.shares import ShareControl
from semipd_jax.coordinator.structured import GrammarThreads
from semipd_jax.coordinator.tuned import TunedShares
from semipd_jax.errors import StartupError
from semipd_jax.grammar.grammars import Grammars
from semipd_jax.messages import (
    FromCoordinator,
    FromWorker,
    MemoryLayout,
    ShareUnavailable,
    ToCoordinator,
    ToWorker,
    WorkerLost,
)
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Limits
from semipd_jax.transport.channels import CLIENTS, WORKERS, Hub, Poller
from semipd_jax.tuner.setup import targets_of, tuner_factory

_TICK_S: Final = 0.5

_log = logging.getLogger(__name__)


def main(child: Child) -> None:
    spec = child.spec
    layout, config = spec.layout, spec.config.scheduler
    if layout is None:
        raise StartupError("the coordinator was started without a memory layout")
    limits = Limits(
        page_size=layout.page_size,
        num_pages=layout.num_pages,
        num_rows=layout.num_rows,
        max_model_len=layout.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        policy=config.policy,
        ageing_tokens_per_s=config.ageing_tokens_per_s,
        enable_prefix_caching=spec.config.cache.enable_prefix_caching,
    )
    workers = Hub[FromWorker, ToWorker](spec.run_dir, WORKERS, FromWorker)
    clients = Hub[ToCoordinator, FromCoordinator](spec.run_dir, CLIENTS, ToCoordinator)
    scheduler = Scheduler(limits)
    grammars = _grammars(spec.config.model, layout)
    coordinator = Coordinator(
        scheduler,
        workers,
        clients,
        _share_control(spec.config, scheduler),
        step_timeout_s=spec.config.timeouts.step_s,
        tell_launcher=child.send,
        grammars=grammars,
    )
    poller = Poller()
    for source in (workers, clients, child.fileno()):
        poller.add(source)
    if grammars is not None:
        poller.add(grammars.fileno())
    child.ready()
    while not child.stopping.is_set():
        poller.wait(_TICK_S)
        for command in child.receive():
            match command:
                case WorkerLost(worker_id=worker_id, lane=lane):
                    coordinator.worker_lost(lane, worker_id)
                case ShareUnavailable(lane=lane, share=share):
                    coordinator.share_unavailable(lane, share)
                case _:
                    pass
        for _, message in workers.receive():
            coordinator.from_worker(message)
        for client, message in clients.receive():
            coordinator.from_client(client, message)
        if grammars is not None:
            coordinator.masks_made()
        coordinator.watch()
        child.alive()
    workers.close()
    clients.close()


def _grammars(model: ModelConfig, layout: MemoryLayout) -> GrammarThreads | None:
    """None if masks cannot be made for the model's tokenizer."""
    try:
        text = (Path(model.tokenizer_path) / "tokenizer.json").read_text("utf-8")
        return GrammarThreads(Grammars(text, layout.vocab_size, layout.eos_token_ids))
    except (OSError, ValueError) as error:
        _log.warning("no structured outputs with this tokenizer: %s", error)
        return None


def _share_control(config: EngineConfig, scheduler: Scheduler) -> ShareControl[Any]:
    targets = targets_of(config.tuner)
    if config.mode != "semi-pd":
        return ShareControl(config.shares, LANES[config.mode], targets)
    return TunedShares(
        config.shares,
        tuner_factory(config),
        scheduler,
        time.monotonic,
        policy=config.tuner.policy,
        targets=targets,
    )


if __name__ == "__main__":
    run_child(main)
