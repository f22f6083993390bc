"""Is there a pair of static shares that does better than a policy?"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any, Final

from benchmarks.goodput.simulated import Simulated
from semipd_jax.simulator.systems import parse

SHARES: Final = (0.2, 0.4, 0.7, 1.0)
SLACK: Final = 0.98
_NEAR: Final = 0.05
"""Attainments further below the target are not told."""
_ROUNDING: Final = 1e-9


def against_statics(ours: Simulated, rates: Mapping[int, float]) -> dict[str, Any]:
    """Whether a pair of `SHARES`, with the idle rule or without, under either order of prefills,
    still holds the targets where a policy would be `SLACK` times as good as it is. All of them run
    the same requests at the same rates, so that they can be told apart better than by goodput.

    Args:
      ours: the policy, whose load and device they get.
      rates: seed → its goodput.

    Returns:
      `rates`, requests/s of each seed; `attainment`, name → mean over the seeds, of the policy
      and of each pair, None if far below the target; `better`, the pairs that hold it.
    """
    target = ours.setup.targets.attainment
    higher = {seed: rate / SLACK for seed, rate in rates.items()}
    names = (ours.name, *static_pairs())
    met = {name: _mean(replace(ours, system=parse(name)), higher, target - _NEAR) for name in names}
    better = [name for name in names[1:] if (met[name] or 0.0) >= target - _ROUNDING]
    return {"rates": higher, "attainment": met, "better": better}


def _mean(subject: Simulated, rates: Mapping[int, float], least: float) -> float | None:
    """Attainment over the seeds; None as soon as it is bound to be below `least`."""
    total = 0.0
    for i, (seed, rate) in enumerate(rates.items(), start=1):
        num_left = len(rates) - i  # of which none may miss anything
        needed = least * len(rates) - total - num_left - _ROUNDING
        met = subject.attainment(seed, rate, needed)
        if met < needed:
            return None
        total += met
    return total / len(rates)


def static_pairs() -> list[str]:
    """With all of the device there is nothing to take when alone."""
    return [
        f"static:{x:g},{y:g}{idle}{order}"
        for x, y in product(SHARES, SHARES)
        for idle in ("", "+idle")[: 1 if x == y == 1 else 2]
        for order in ("", "+spf")
    ]
