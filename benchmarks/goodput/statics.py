"""Is there a pair of static shares that does better than a policy?"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Final

from benchmarks.goodput.simulated import Simulated
from semipd_jax.simulator.systems import parse

SHARES: Final = (0.2, 0.4, 0.7, 1.0)
SLACK: Final = 0.98
_ROUNDING: Final = 1e-9


def better_statics(ours: Simulated, rates: Mapping[int, float]) -> list[str]:
    """Pairs of `SHARES`, with the idle rule and without, under either order of prefills, that on
    average over the seeds still hold the targets where a policy would be `SLACK` times as good as
    they are.

    Args:
      ours: the policy, whose load and device they get.
      rates: seed → its goodput.
    """
    target = ours.setup.targets.attainment

    def holds(name: str) -> bool:
        subject = replace(ours, system=parse(name))
        to_meet = target * len(rates)
        for i, (seed, rate) in enumerate(rates.items(), start=1):
            num_left = len(rates) - i  # of which none may miss anything
            least = to_meet - num_left - _ROUNDING
            met = subject.attainment(seed, rate / SLACK, least)
            if met < least:
                return False
            to_meet -= met
        return True

    return [name for name in static_pairs() if holds(name)]


def static_pairs() -> list[str]:
    """With all of the device there is nothing to take when alone."""
    return [
        f"static:{x:g},{y:g}{idle}{order}"
        for x, y in product(SHARES, SHARES)
        for idle in ("", "+idle")[: 1 if x == y == 1 else 2]
        for order in ("", "+spf")
    ]
