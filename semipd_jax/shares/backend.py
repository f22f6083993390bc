"""How the compute of one process is capped on one platform."""

from collections.abc import Callable, Mapping
from typing import Final, Protocol, runtime_checkable

from semipd_jax.config import Platform
from semipd_jax.errors import StartupError
from semipd_jax.messages import Phase
from semipd_jax.shares import cpu


@runtime_checkable
class Grant(Protocol):
    """The compute that this process was confined to."""

    def verify(self) -> str:
        """Says what this process can use. Raises StartupError if that is more than it was given."""
        ...


type Apply = Callable[[float, Phase], Grant]

_APPLY: Final[Mapping[Platform, Apply]] = {"cpu": cpu.apply}


def apply(platform: Platform, share: float, phase: Phase) -> Grant:
    """Confines this process to `share` of the device, 0 < share ≤ 1, until it ends.

    A worker calls it once, first thing, before jax is imported, and `verify` after its first step.
    Raises StartupError for a platform that has no shares yet.
    """
    if platform not in _APPLY:
        raise StartupError(f"platform is {platform!r}; allowed: {', '.join(_APPLY)}")
    return _APPLY[platform](share, phase)
