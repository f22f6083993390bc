"""Which share each phase should run at."""

from semipd_jax.config import ShareConfig, SharePolicy
from semipd_jax.errors import ConfigError
from semipd_jax.messages import Choice, DecodeStep, Phase, PrefillStep
from semipd_jax.tuner.policy import FinishedRequest
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.tuner import PredictionError


class ShareControl:
    """The shares that were asked for, and the idle rule: a phase alone takes all it can get.

    What it is told of steps and requests is for those who choose shares by them.

    Attributes:
      asked: the share of each phase while both have work.
      rungs: shares whose workers are kept warm, whatever is asked for.
      policy: who chooses what is asked for.
      targets: what was promised.
      errors: of the steps that were predicted.
    """

    def __init__(self, config: ShareConfig, targets: SloTargets | None = None) -> None:
        self.asked: dict[Phase, float] = {"prefill": config.prefill, "decode": config.decode}
        self.rungs: dict[Phase, frozenset[float]] = {
            "prefill": frozenset(config.rungs("prefill")),
            "decode": frozenset(config.rungs("decode")),
        }
        self.policy: SharePolicy = "static"
        self.targets = targets or SloTargets()
        self.errors: dict[Phase, PredictionError] = {
            "prefill": PredictionError(),
            "decode": PredictionError(),
        }

    def wanted(self, phase: Phase, *, is_alone: bool) -> float:
        """The share for the phase's next step."""
        return max(self.asked[phase], *self.rungs[phase]) if is_alone else self.asked[phase]

    def set_policy(self, policy: SharePolicy, targets: SloTargets) -> None:
        """Raises ConfigError, and changes nothing, if the policy cannot work."""
        if policy != "static":
            raise ConfigError(f"policy is {policy!r}; allowed: static")
        self.targets = targets

    def choice(self, now_s: float) -> Choice | None:
        """The policy's latest one."""
        return None

    def step_sent(self, phase: Phase, step: PrefillStep | DecodeStep, share: float) -> None:
        pass

    def step_done(self, phase: Phase, device_s: float) -> None:
        """The phase's oldest step in flight was answered."""

    def steps_lost(self, phase: Phase) -> None:
        """The phase's steps in flight were taken back."""

    def request_ended(self, request: FinishedRequest) -> None:
        pass
