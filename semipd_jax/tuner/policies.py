"""Policies by name."""

from collections.abc import Callable, Mapping
from typing import Final

from semipd_jax.config import POLICIES, SharePolicy
from semipd_jax.errors import ConfigError
from semipd_jax.tuner.latency import LatencyModel
from semipd_jax.tuner.policy import FULL, Ladder, Policy, Shares
from semipd_jax.tuner.predictive import Predictive
from semipd_jax.tuner.replan import Replan
from semipd_jax.tuner.semi_pd import SemiPd
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.static import Static
from semipd_jax.tuner.tuner import Tuner

_REACTIVE: Final[Mapping[str, Callable[..., Policy]]] = {
    "semi-pd": SemiPd,
    "semi-pd-replan": Replan,
}
POLICY_NAMES: Final = POLICIES


def make_tuner(
    name: SharePolicy,
    *,
    ladder: Ladder,
    targets: SloTargets,
    model: LatencyModel | None,
    start: Shares = FULL,
) -> Tuner:
    """
    Args:
      model: refined in place by the predictive policy; the others do not use it.
      start: what static keeps and reactive policies begin with.

    Raises:
      ConfigError: the predictive policy has no model.
    """
    if name == "static":
        return Tuner(Static(start))
    if name == "predictive":
        if model is None:
            raise ConfigError(f"policy is {name!r}; it needs a tuner_profile")
        return Tuner(Predictive(ladder, targets, model), model)
    return Tuner(_REACTIVE[name](ladder, targets, start=start))
