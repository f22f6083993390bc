"""What a policy sees and what it answers. One protocol, so that policies can be compared.

A policy is asked before every step of either phase. Only the share of the phase that the step
belongs to takes effect: a step in flight keeps the worker it was sent to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from semipd_jax.config import require
from semipd_jax.messages import Phase
from semipd_jax.tuner.work import Work

type Ladder = tuple[float, ...]
"""Shares at which a phase has workers, ascending; the last one is 1.0."""


@dataclass(frozen=True, slots=True)
class Ladders:
    """Of each phase. Raises ConfigError unless both are ladders."""

    prefill: Ladder
    decode: Ladder

    def __post_init__(self) -> None:
        for phase, ladder in (("prefill", self.prefill), ("decode", self.decode)):
            ascending = list(ladder) == sorted(set(ladder))
            ok = bool(ladder) and ascending and ladder[0] > 0 and ladder[-1] == 1
            name = f"{phase}_share_ladder (or share_ladder)"
            require(ok, name, ladder, "ascending shares above 0, the last one 1.0")

    def of(self, phase: Phase) -> Ladder:
        return self.prefill if phase == "prefill" else self.decode

    @property
    def num_workers(self) -> int:
        return len(self.prefill) + len(self.decode)


@dataclass(frozen=True, slots=True)
class Shares:
    prefill: float
    decode: float

    def of(self, phase: Phase) -> float:
        return self.prefill if phase == "prefill" else self.decode


FULL: Final = Shares(1.0, 1.0)


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """Seconds of one request: what reactive policies learn from.

    Attributes:
      queue_s, prefill_s: they add up to the TTFT.
      tpot_s: None for a single token.
    """

    arrival_s: float
    queue_s: float
    prefill_s: float
    tpot_s: float | None
    priority: int = 0

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.prefill_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The engine at the moment when a step of `phase` is about to be sent.

    Attributes:
      prefill, decode: work of the step to be sent, and of the one in flight in the other phase;
        None if that phase has nothing to do.
      shares: of `phase` what was chosen last, of the other phase that of its latest step.
      kv_used: part of the pages that requests hold or wait for, 0 to 1.
      priorities: classes of the requests that decode.
      finished: requests that ended since the last observation.
    """

    now_s: float
    phase: Phase
    prefill: Work | None
    decode: Work | None
    shares: Shares
    kv_used: float
    priorities: frozenset[int] = frozenset({0})
    finished: Sequence[FinishedRequest] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """The shares to use, and why.

    Attributes:
      reason: a few words, the same ones for the same rule.
      predicted_prefill_s, predicted_decode_s: of the works in the observation, if predicted. By
        semi-PD's rules a window's TTFT and TPOT instead, if it had run at these shares.
      inputs: numbers that the choice followed from, by name.
    """

    shares: Shares
    reason: str
    predicted_prefill_s: float | None = None
    predicted_decode_s: float | None = None
    inputs: tuple[tuple[str, float], ...] = ()

    def record(self) -> dict[str, Any]:
        """For logs."""
        return msgspec.to_builtins(self) | {"inputs": dict(self.inputs)}


@runtime_checkable
class Policy(Protocol):
    def decide(self, observation: Observation) -> Decision: ...


def rung_above(share: float, ladder: Ladder) -> float | None:
    return next((rung for rung in ladder if rung > share), None)


def rung_below(share: float, ladder: Ladder) -> float | None:
    return next((rung for rung in reversed(ladder) if rung < share), None)
