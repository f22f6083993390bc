"""From an engine's options to its tuner."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from semipd_jax.config import EngineConfig, SharePolicy, TunerConfig, require
from semipd_jax.errors import ConfigError
from semipd_jax.tuner.policies import make_tuner
from semipd_jax.tuner.policy import Shares
from semipd_jax.tuner.profile import Profile, from_json, model_of
from semipd_jax.tuner.slo import SloTarget, SloTargets, parse_classes
from semipd_jax.tuner.tuner import Tuner

_LADDER: Final = "the same share_ladder for both phases, two shares or more, the largest 1.0"


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


def tuner_factory(
    config: EngineConfig,
) -> Callable[[SharePolicy, SloTargets, Shares], Tuner | None]:
    """What makes the tuner of a policy, None for "static", which needs none. All tuners of one
    factory refine one latency model.

    Raises:
      ConfigError: the profile cannot be used. The factory raises it for a policy that cannot work
        with these options.
    """
    path, shares = config.tuner.profile, config.shares
    model = None if path is None else model_of(load_profile(path))

    def make(policy: SharePolicy, targets: SloTargets, start: Shares) -> Tuner | None:
        if policy == "static":
            return None
        ladder = shares.rungs("prefill")
        is_ladder = len(ladder) > 1 and ladder == shares.rungs("decode") and ladder[-1] == 1.0
        require(is_ladder, f"share_ladder under the policy {policy}", ladder, _LADDER)
        _require_promises(policy, targets)
        return make_tuner(policy, ladder=ladder, targets=targets, model=model, start=start)

    return make


def check(config: EngineConfig) -> None:
    """Raises ConfigError unless the tuner of these options can work."""
    start = Shares(config.shares.prefill, config.shares.decode)
    tuner_factory(config)(config.tuner.policy, targets_of(config.tuner), start)


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
