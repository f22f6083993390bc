"""A link between two devices, that KV moves over."""

from dataclasses import dataclass

from semipd_jax.simulator.machine import Load
from semipd_jax.tuner.work import Work


@dataclass(frozen=True, slots=True)
class Link:
    """A machine, so that a device's lane can be one: a "step" is the KV of its prompts."""

    bytes_per_s: float
    latency_s: float
    bytes_per_token: int

    def load(self, works: tuple[Work, ...]) -> Load:
        return Load(works)

    def alone_s(self, load: Load, share: float) -> float:
        tokens = sum(work.num_tokens for work in load.works)
        return self.latency_s + tokens * self.bytes_per_token / self.bytes_per_s

    def together_s(self, a: Load, share_a: float, b: Load, share_b: float) -> tuple[float, float]:
        return self.alone_s(a, share_a), self.alone_s(b, share_b)
