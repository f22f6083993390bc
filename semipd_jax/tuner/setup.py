"""From an engine's options to its tuner."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from semipd_jax.config import PHASES, EngineConfig, ShareConfig, SharePolicy, TunerConfig, require
from semipd_jax.errors import ConfigError, StartupError
from semipd_jax.messages import MemoryLayout
from semipd_jax.tuner.policies import make_tuner
from semipd_jax.tuner.policy import Ladders, Shares
from semipd_jax.tuner.profile import Profile, Sizes, from_json, model_of
from semipd_jax.tuner.refined import RefinedModel
from semipd_jax.tuner.slo import SloTarget, SloTargets, parse_classes
from semipd_jax.tuner.tuner import Tuner

_CHOICE: Final = "two shares or more for one phase at least, to choose from"

_log = logging.getLogger(__name__)


def ladders_of(config: ShareConfig) -> Ladders:
    """Raises ConfigError if these are no ladders, or leave nothing to choose."""
    ladders = Ladders(config.rungs("prefill"), config.rungs("decode"))
    has_choice = ladders.num_workers > len(PHASES)
    require(has_choice, "share_ladder", config.ladder, _CHOICE)
    return ladders


def targets_of(config: TunerConfig) -> SloTargets:
    default = SloTarget(config.slo_ttft_ms, config.slo_tpot_ms)
    return SloTargets(default, parse_classes(config.slo_classes), config.slo_target)


def load_profile(path: str) -> Profile:
    """Raises ConfigError if this is no profile."""
    try:
        return from_json(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"tuner_profile {path!r} cannot be read: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"tuner_profile {path!r}: {error}") from error


def check_profile(config: EngineConfig, device: str, layout: MemoryLayout) -> None:
    """Compares what the profile was made for with what is about to run, and warns of differences.

    Raises:
      StartupError: it is of a model of another size, so its step times cannot be right.
    """
    path, model = config.tuner.profile, config.model.name
    if path is None:
        return
    profile, sizes = load_profile(path), Sizes.of(layout)
    if profile.sizes is None:
        if profile.model != model:
            _log.warning("%s is a profile of the model %r, not of %r", path, profile.model, model)
    elif not sizes.is_like(profile.sizes):
        raise StartupError(
            f"tuner_profile {path!r} is of the model {profile.model!r} with {profile.sizes}; the "
            f"model here is {model!r} with {sizes}: make a profile of it, with its dtype"
        )
    if profile.device != device:
        _log.warning("%s is a profile of the device %r, not of %r", path, profile.device, device)
    for phase, measured in profile.rungs.items():
        if (least := min(config.shares.rungs(phase))) < min(measured):
            text = "%s was measured down to a share of %g for %s; the ladder goes down to %g"
            _log.warning(text, path, min(measured), phase, least)


def tuner_factory(
    config: EngineConfig,
) -> Callable[[SharePolicy, SloTargets, Shares], Tuner | None]:
    """What makes the tuner of a policy, None for "static", which needs none. All tuners of one
    factory refine one latency model: what it has learnt outlives a change of promises.

    Raises:
      ConfigError: the profile cannot be used. The factory raises it for a policy that cannot work
        with these options.
    """
    path, shares = config.tuner.profile, config.shares
    model = None if path is None else RefinedModel(model_of(load_profile(path)))

    def make(policy: SharePolicy, targets: SloTargets, start: Shares) -> Tuner | None:
        if policy == "static":
            return None
        ladders = ladders_of(shares)
        _require_promises(policy, targets)
        return make_tuner(policy, ladders=ladders, targets=targets, model=model, start=start)

    return make


def check(config: EngineConfig) -> None:
    """Raises ConfigError unless the tuner of these options can work."""
    start = Shares(config.shares.prefill, config.shares.decode)
    tuner_factory(config)(config.share_policy, targets_of(config.tuner), start)


def _require_promises(policy: SharePolicy, targets: SloTargets) -> None:
    """Without a promise to keep, a policy would starve whatever nobody was promised."""
    target = targets.default
    if policy == "predictive":
        allowed = f"a number, under the policy {policy}"
        require(target.tpot_ms is not None, "slo_tpot_ms", target.tpot_ms, allowed)
    else:
        given = (target.ttft_ms, target.tpot_ms)
        allowed = f"numbers, under the policy {policy}"
        require(None not in given, "slo_ttft_ms and slo_tpot_ms", given, allowed)
