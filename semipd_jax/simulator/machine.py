"""How long steps take on a modelled device, alone and side by side."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from semipd_jax.tuner.work import Work


@dataclass(frozen=True, slots=True)
class Load:
    """A step of one phase, or one fused step of both: `works` run as one program."""

    works: tuple[Work, ...]
    ops: tuple[tuple[float, float], ...] = ()
    fixed_s: float = 0.0


@runtime_checkable
class Machine(Protocol):
    """Times are seconds without noise; shares are those of the workers, 0 to 1."""

    def load(self, works: tuple[Work, ...]) -> Load:
        """A step, prepared for the calls below."""
        ...

    def alone_s(self, load: Load, share: float) -> float: ...

    def together_s(self, a: Load, share_a: float, b: Load, share_b: float) -> tuple[float, float]:
        """Each step's time if the other one ran all the while."""
        ...
