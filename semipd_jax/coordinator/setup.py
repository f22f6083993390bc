"""From a configuration and a memory layout to a coordinator."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semipd_jax.config import LANES, EngineConfig, ModelConfig
from semipd_jax.coordinator.coordinator import Coordinator, Sender
from semipd_jax.coordinator.shares import ShareControl
from semipd_jax.coordinator.structured import GrammarThreads, MaskMaker
from semipd_jax.coordinator.tuned import TunedShares
from semipd_jax.grammar.grammars import Grammars
from semipd_jax.messages import FromCoordinator, MemoryLayout, ToLauncher, ToWorker
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Limits
from semipd_jax.tuner.setup import targets_of, tuner_factory

_log = logging.getLogger(__name__)


def build_coordinator(
    config: EngineConfig,
    layout: MemoryLayout,
    workers: Sender[ToWorker],
    clients: Sender[FromCoordinator],
    *,
    tell_launcher: Callable[[ToLauncher], None],
    grammars: MaskMaker | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Coordinator:
    """See `Coordinator`. Raises ConfigError if the tuner's options cannot work."""
    scheduler = Scheduler(limits_of(config, layout))
    return Coordinator(
        scheduler,
        workers,
        clients,
        _share_control(config, scheduler, clock),
        step_timeout_s=config.timeouts.step_s,
        tell_launcher=tell_launcher,
        grammars=grammars,
        clock=clock,
    )


def limits_of(config: EngineConfig, layout: MemoryLayout) -> Limits:
    asked = config.scheduler
    return Limits(
        page_size=layout.page_size,
        num_pages=layout.num_pages,
        num_rows=layout.num_rows,
        max_model_len=layout.max_model_len,
        max_num_batched_tokens=asked.max_num_batched_tokens,
        max_num_queued_reqs=asked.max_num_queued_reqs,
        max_num_queued_tokens=asked.max_num_queued_tokens,
        policy=asked.policy,
        ageing_tokens_per_s=asked.ageing_tokens_per_s,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )


def make_grammars(model: ModelConfig, layout: MemoryLayout) -> GrammarThreads | None:
    """None if masks cannot be made for the model's tokenizer."""
    try:
        text = (Path(model.tokenizer_path) / "tokenizer.json").read_text("utf-8")
        return GrammarThreads(Grammars(text, layout.vocab_size, layout.eos_token_ids))
    except (OSError, ValueError) as error:
        _log.warning("no structured outputs with this tokenizer: %s", error)
        return None


def _share_control(
    config: EngineConfig, scheduler: Scheduler, clock: Callable[[], float]
) -> ShareControl[Any]:
    targets = targets_of(config.tuner)
    if config.mode != "semi-pd":
        return ShareControl(config.shares, LANES[config.mode], targets)
    return TunedShares(
        config.shares,
        tuner_factory(config),
        scheduler,
        clock,
        policy=config.share_policy,
        targets=targets,
    )
