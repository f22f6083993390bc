"""Shares that never change."""

from semipd_jax.config import require
from semipd_jax.tuner.policy import Decision, Observation, Shares


class Static:
    def __init__(self, shares: Shares) -> None:
        for name, share in (("prefill_share", shares.prefill), ("decode_share", shares.decode)):
            require(0 < share <= 1, name, share, "above 0 and at most 1")
        self._decision = Decision(shares, "static")

    def decide(self, observation: Observation) -> Decision:
        return self._decision
