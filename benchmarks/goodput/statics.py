"""Is there a pair of static shares that does better than a policy?"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Final

from benchmarks.goodput.simulated import Simulated
from semipd_jax.simulator.systems import parse

SHARES: Final = (0.2, 0.4, 0.7, 1.0)
SLACK: Final = 0.98


def better_statics(any_subject: Simulated, rates: Mapping[int, float]) -> list[str]:
    """Pairs of `SHARES`, under either order of prefills, that on average over the seeds still hold
    the targets where a policy would be `SLACK` times as good as they are.

    Args:
      any_subject: whose load and device they get.
      rates: seed → goodput of the policy.
    """
    targets = any_subject.setup.targets

    def holds(name: str) -> bool:
        subject = replace(any_subject, system=parse(name))
        met: list[float] = []
        for seed, rate in rates.items():
            with subject.running(seed) as trial:
                met.append(trial(rate / SLACK).attainment(targets.default))
        return sum(met) / len(met) >= targets.attainment

    return [name for name in static_pairs() if holds(name)]


def static_pairs() -> list[str]:
    return [
        f"static:{x:g},{y:g}{order}" for x, y in product(SHARES, SHARES) for order in ("", "+spf")
    ]
