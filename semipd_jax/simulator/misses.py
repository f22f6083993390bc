"""Requests of a run that miss their target, counted as soon as that is certain."""

import math
from collections.abc import Sequence
from typing import Final

from semipd_jax.simulator.traces import TraceRow
from semipd_jax.tuner.slo import SloTarget

_ROUNDING_S: Final = 1e-6


class Misses:
    """
    Args:
      rows: what is run; requests go by their positions.

    Attributes:
      num: certain misses so far.
    """

    def __init__(self, rows: Sequence[TraceRow], target: SloTarget) -> None:
        self.num = 0
        self._target = target
        self._is_open = [True] * len(rows)
        latest = [(_latest_end_s(row, target), number) for number, row in enumerate(rows)]
        self._by_latest_end = sorted(latest, reverse=True)

    def ended(self, number: int, *, ttft_s: float, tpot_s: float | None) -> None:
        """`ttft_s` is NaN if the request was refused, which is a miss."""
        is_met = not math.isnan(ttft_s) and self._target.is_met(ttft_s=ttft_s, tpot_s=tpot_s)
        self._close(number, is_met=is_met)

    def pass_to(self, now_s: float) -> None:
        """Whoever has not ended at `now_s` although it must have, to be in time, is a miss."""
        while self._by_latest_end and self._by_latest_end[-1][0] < now_s:
            self._close(self._by_latest_end.pop()[1], is_met=False)

    def _close(self, number: int, *, is_met: bool) -> None:
        if self._is_open[number]:
            self._is_open[number] = False
            self.num += not is_met


def _latest_end_s(row: TraceRow, target: SloTarget) -> float:
    """With both targets just met."""
    ttft_ms, tpot_ms = (math.inf if ms is None else ms for ms in (target.ttft_ms, target.tpot_ms))
    decode_ms = tpot_ms * (row.output_len - 1) if row.output_len > 1 else 0.0
    return row.arrival_s + (ttft_ms + decode_ms) / 1e3 + _ROUNDING_S
