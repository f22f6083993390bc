"""Which share each phase should run at."""

from semipd_jax.config import ShareConfig
from semipd_jax.messages import Phase


class ShareControl:
    """The shares that were asked for, and the idle rule: a phase alone takes all it can get.

    Attributes:
      asked: the share of each phase while both have work.
      rungs: shares whose workers are kept warm, whatever is asked for.
    """

    def __init__(self, config: ShareConfig) -> None:
        self.asked: dict[Phase, float] = {"prefill": config.prefill, "decode": config.decode}
        self.rungs: dict[Phase, frozenset[float]] = {
            "prefill": frozenset(config.rungs("prefill")),
            "decode": frozenset(config.rungs("decode")),
        }

    def wanted(self, phase: Phase, *, is_alone: bool) -> float:
        """The share for the phase's next step."""
        return max(self.asked[phase], *self.rungs[phase]) if is_alone else self.asked[phase]
