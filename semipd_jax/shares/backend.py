"""How the compute of one process is capped on one platform."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from semipd_jax.config import Lane, Platform, ShareConfig
from semipd_jax.shares import cpu, mps

type Terms = Mapping[str, str]
"""What the launcher's side tells every worker about sharing, in `ChildSpec.extra`."""


@runtime_checkable
class Grant(Protocol):
    """The compute that this process was confined to."""

    def verify(self) -> str:
        """Says what this process can use. Raises StartupError if that is more than it was given."""
        ...


@dataclass(frozen=True, slots=True)
class _Backend:
    host: Callable[[ShareConfig, str, int], AbstractContextManager[Terms]]
    apply: Callable[[float, Lane, Terms], Grant]
    abstain: Callable[[str], None]
    evict: Callable[[int, Terms], None]
    is_fate_shared: Callable[[Terms], bool]


_BACKENDS: Final[Mapping[Platform, _Backend]] = {
    "cpu": _Backend(cpu.host, cpu.apply, cpu.abstain, cpu.evict, cpu.is_fate_shared),
    "cuda": _Backend(mps.host, mps.apply, mps.abstain, mps.evict, mps.is_fate_shared),
}


def host(
    platform: Platform, config: ShareConfig, run_dir: str, num_sms: int
) -> AbstractContextManager[Terms]:
    """What has to be there while workers live; the context ends after the last of them.

    Raises StartupError if compute cannot be shared as the configuration wants.

    Args:
      num_sms: of the whole device; 0 on a CPU.
    """
    return _BACKENDS[platform].host(config, run_dir, num_sms)


def apply(platform: Platform, share: float, lane: Lane, terms: Terms) -> Grant:
    """Confines this process to `share` of the device, 0 < share ≤ 1, until it ends.

    A worker calls it once, first thing, before jax is imported, and `verify` after its first step.
    """
    return _BACKENDS[platform].apply(share, lane, terms)


def abstain(platform: Platform, run_dir: str) -> None:
    """Keeps this process out of the sharing of compute. Call it before anything uses the device."""
    _BACKENDS[platform].abstain(run_dir)


def evict(platform: Platform, pid: int, terms: Terms) -> None:
    """Takes a worker that hangs off the device; whoever calls this kills it next."""
    _BACKENDS[platform].evict(pid, terms)


def is_fate_shared(platform: Platform, terms: Terms) -> bool:
    """Whether a fatal fault of one worker on the device ends what the others do there."""
    return _BACKENDS[platform].is_fate_shared(terms)
