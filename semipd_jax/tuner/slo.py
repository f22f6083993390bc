"""What latency was promised, to whom."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from semipd_jax.config import require

_MS_PER_S: Final = 1e3
_CLASSES: Final = "priority:ttft_ms:tpot_ms,... with empty numbers for no promise"


@dataclass(frozen=True, slots=True)
class SloTarget:
    """Milliseconds that a request may take; None promises nothing.

    Attributes:
      ttft_ms: from arrival to the first token.
      tpot_ms: mean time of the tokens after the first.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("slo_ttft_ms", self.ttft_ms), ("slo_tpot_ms", self.tpot_ms)):
            require(value is None or value > 0, name, value, "a positive number, or unset")

    def is_met(self, *, ttft_s: float, tpot_s: float | None) -> bool:
        return self.ttft_is_met(ttft_s) and self.tpot_is_met(tpot_s)

    def ttft_is_met(self, ttft_s: float) -> bool:
        return self.ttft_ms is None or ttft_s * _MS_PER_S <= self.ttft_ms

    def tpot_is_met(self, tpot_s: float | None) -> bool:
        """`tpot_s` is None for a request with a single token: it has no TPOT to miss."""
        return self.tpot_ms is None or tpot_s is None or tpot_s * _MS_PER_S <= self.tpot_ms


@dataclass(frozen=True, slots=True)
class SloTargets:
    """
    Attributes:
      default: of requests whose class is not listed.
      by_class: request priority → its targets.
      attainment: the share of requests that should meet both.
    """

    default: SloTarget = SloTarget()
    by_class: Mapping[int, SloTarget] = field(default_factory=dict[int, SloTarget])
    attainment: float = 0.9

    def __post_init__(self) -> None:
        require(0 < self.attainment < 1, "slo_target", self.attainment, "between 0 and 1")

    def of(self, priority: int) -> SloTarget:
        return self.by_class.get(priority, self.default)

    def tightest_tpot_s(self, priorities: Collection[int]) -> float:
        """Seconds per token that satisfy all of these classes; infinity if none was promised."""
        targets = {self.of(priority).tpot_ms for priority in priorities}
        return min((t / _MS_PER_S for t in targets if t is not None), default=float("inf"))


def parse_classes(text: str) -> dict[int, SloTarget]:
    """For instance "5:2000:100,9::200": priority 9 is promised a TPOT alone.

    Raises ConfigError.
    """
    targets: dict[int, SloTarget] = {}
    for word in filter(None, text.split(",")):
        try:
            priority, *milliseconds = word.split(":")
            ttft_ms, tpot_ms = (float(ms) if ms else None for ms in milliseconds)
            targets[int(priority)] = SloTarget(ttft_ms, tpot_ms)
        except ValueError:
            require(False, "slo_classes", text, _CLASSES)
    return targets
