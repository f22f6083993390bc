"""Policies by name."""

from collections.abc import Callable, Mapping
from typing import Final, Literal

from semipd_jax.tuner.latency import LatencyModel
from semipd_jax.tuner.policy import FULL, Ladder, Policy, Shares
from semipd_jax.tuner.predictive import Predictive
from semipd_jax.tuner.replan import Replan
from semipd_jax.tuner.semi_pd import SemiPd
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.static import Static
from semipd_jax.tuner.tuner import Tuner

type PolicyName = Literal["static", "semi-pd", "semi-pd-replan", "predictive"]

_REACTIVE: Final[Mapping[str, Callable[..., Policy]]] = {
    "semi-pd": SemiPd,
    "semi-pd-replan": Replan,
}
POLICY_NAMES: Final = ("static", *_REACTIVE, "predictive")


def make_tuner(
    name: PolicyName,
    *,
    ladder: Ladder,
    targets: SloTargets,
    model: LatencyModel,
    start: Shares = FULL,
) -> Tuner:
    """
    Args:
      model: refined in place by the predictive policy; the others do not use it.
      start: what static keeps and reactive policies begin with.
    """
    if name == "static":
        return Tuner(Static(start))
    if name == "predictive":
        return Tuner(Predictive(ladder, targets, model), model)
    return Tuner(_REACTIVE[name](ladder, targets, start=start))
