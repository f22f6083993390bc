"""Policies by name."""

from collections.abc import Callable, Mapping
from typing import Final

from semipd_jax.config import SharePolicy
from semipd_jax.errors import ConfigError
from semipd_jax.tuner.policy import FULL, Ladders, Policy, Shares
from semipd_jax.tuner.predictive import Predictive
from semipd_jax.tuner.refined import RefinedModel
from semipd_jax.tuner.replan import PUBLISHED_LADDER, Replan
from semipd_jax.tuner.semi_pd import SemiPd
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.static import Static
from semipd_jax.tuner.tuner import Tuner

_REACTIVE: Final[Mapping[str, Callable[..., Policy]]] = {
    "semi-pd": SemiPd,
    "semi-pd-replan": Replan,
}

_WIDE: Final = (0.2, 0.4, 0.7, 1.0)
_FINE: Final = PUBLISHED_LADDER[::2]  # no more rungs than an engine may have
LADDERS: Final[Mapping[str, Ladders]] = {
    "predictive": Ladders(prefill=(1.0,), decode=(0.2, 0.4, 1.0)),
    "semi-pd": Ladders(_WIDE, _WIDE),
    "semi-pd-replan": Ladders(_FINE, _FINE),
}
"""Policy → what suits it, see docs/tuning.md."""


def make_tuner(
    name: SharePolicy,
    *,
    ladders: Ladders,
    targets: SloTargets,
    model: RefinedModel | None,
    start: Shares = FULL,
) -> Tuner:
    """
    Args:
      model: refined by the predictive policy; the others do not use it.
      start: what static keeps and reactive policies begin with.

    Raises:
      ConfigError: the predictive policy has no model.
    """
    if name == "static":
        return Tuner(Static(start))
    if name == "predictive":
        if model is None:
            raise ConfigError(f"policy is {name!r}; it needs a tuner_profile")
        return Tuner(Predictive(ladders, targets, model.model), model)
    return Tuner(_REACTIVE[name](ladders, targets, start=start))
