"""Which share each lane should run at."""

from collections.abc import Iterable

from semipd_jax.config import Lane, Phase, ShareConfig, SharePolicy
from semipd_jax.errors import ConfigError
from semipd_jax.messages import Choice, ToWorker
from semipd_jax.tuner.policy import FinishedRequest
from semipd_jax.tuner.refined import PredictionError
from semipd_jax.tuner.slo import SloTargets


class ShareControl[L: Lane]:
    """The shares that were asked for, and the idle rule: a lane alone takes all it can get.

    What it is told of steps and requests is for those who choose shares by them.

    Attributes:
      configured: the share of each lane before anybody changed it, in the order of planning.
      asked: the share of each lane while all have work.
      rungs: shares whose workers are kept warm, whatever is asked for.
      policy: who chooses what is asked for.
      targets: what was promised.
      errors: of the steps that were predicted.
    """

    def __init__(
        self, config: ShareConfig, lanes: Iterable[L], targets: SloTargets | None = None
    ) -> None:
        self.configured: dict[L, float] = {lane: config.share(lane) for lane in lanes}
        self.asked = dict(self.configured)
        self.rungs: dict[L, frozenset[float]] = {
            lane: frozenset(config.rungs(lane)) for lane in self.asked
        }
        self.policy: SharePolicy = "static"
        self.targets = targets or SloTargets()
        self.errors: dict[Phase, PredictionError] = {
            "prefill": PredictionError(),
            "decode": PredictionError(),
        }

    def wanted(self, lane: L, /, *, is_alone: bool) -> float:
        """The share for the lane's next step."""
        return max(self.asked[lane], *self.rungs[lane]) if is_alone else self.asked[lane]

    def set_policy(self, policy: SharePolicy, targets: SloTargets) -> None:
        """Raises ConfigError, and changes nothing, if the policy cannot work."""
        if policy != "static":
            raise ConfigError(f"policy is {policy!r}; allowed: static")
        self.targets = targets

    def choice(self, now_s: float) -> Choice | None:
        """The policy's latest one."""
        return None

    def step_sent(self, lane: L, /, step: ToWorker, share: float) -> None:
        pass

    def step_done(self, lane: L, /, device_s: float) -> None:
        """The lane's oldest step in flight was answered."""

    def steps_lost(self, lane: L, /) -> None:
        """The lane's steps in flight were taken back."""

    def request_ended(self, request: FinishedRequest) -> None:
        pass
