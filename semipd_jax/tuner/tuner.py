"""A policy, and the model that it predicts with: the engine's handle."""

from semipd_jax.tuner.latency import Sample
from semipd_jax.tuner.policy import Decision, Observation, Policy
from semipd_jax.tuner.refined import RefinedModel


class Tuner:
    """Ask it before each step, tell it after each.

    Args:
      refined: what `policy` predicts with. None if it does not predict.
    """

    def __init__(self, policy: Policy, refined: RefinedModel | None = None) -> None:
        self.policy = policy
        self.refined = refined

    def decide(self, observation: Observation) -> Decision:
        return self.policy.decide(observation)

    def step_done(self, sample: Sample) -> None:
        """Takes in how long a step really took."""
        if self.refined is not None:
            self.refined.step_done(sample)
