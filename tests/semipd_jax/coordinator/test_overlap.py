"""How much of a step ran beside the other phase, against intervals computed afterwards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.coordinator.overlap import Overlaps
from semipd_jax.tuner.latency import Conditions


def test_a_step_alone_has_no_neighbour():
    overlaps = Overlaps()
    overlaps.began("decode", 0.4, 1.0)
    assert overlaps.ended("decode", 2.0) == Conditions(0.4)


def test_time_beside_the_other_phase_counts_with_its_share():
    overlaps = Overlaps()
    overlaps.began("prefill", 0.8, 0.0)
    overlaps.began("decode", 0.4, 6.0)
    assert overlaps.ended("decode", 7.0) == Conditions(0.4, 0.8, 1.0)
    overlaps.began("decode", 0.2, 7.0)
    found = overlaps.ended("prefill", 10.0)
    assert (found.share, found.overlap) == (0.8, 0.4)
    assert found.other_share == pytest.approx(0.25)


def test_a_lost_step_is_no_neighbour():
    overlaps = Overlaps()
    overlaps.began("prefill", 1.0, 0.0)
    overlaps.began("decode", 0.5, 0.0)
    overlaps.lost("prefill", 1.0)
    assert overlaps.ended("decode", 4.0) == Conditions(0.5, 1.0, 0.25)


gaps = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.sampled_from([0.2, 0.5, 1.0])))


@given(gaps, gaps)
def test_conditions_are_those_of_the_intervals(prefill, decode):
    lanes = {"prefill": intervals(prefill), "decode": intervals(decode)}
    events = []
    for phase, steps in lanes.items():
        events += [(begin, 1, phase, i) for i, (begin, _, _) in enumerate(steps)]
        events += [(end, 0, phase, i) for i, (_, end, _) in enumerate(steps)]
    overlaps = Overlaps()
    for now, begins, phase, i in sorted(events):
        share = lanes[phase][i][2]
        if begins:
            overlaps.began(phase, share, float(now))
            continue
        found = overlaps.ended(phase, float(now))
        other = lanes["decode" if phase == "prefill" else "prefill"]
        assert found.share == share
        part, other_share = expected(lanes[phase][i], other)
        assert found.overlap == pytest.approx(part)
        assert found.other_share == pytest.approx(other_share)


def intervals(steps) -> list[tuple[int, int, float]]:
    """One after another: (begin, end, share), from the gap before each and its length."""
    made, now = [], 0
    for gap, length, share in steps:
        made.append((now + gap, now + gap + length, share))
        now += gap + length
    return made


def expected(step, others) -> tuple[float, float]:
    begin, end, _ = step
    beside = [max(0, min(end, e) - max(begin, b)) for b, e, _ in others]
    if sum(beside) == 0:
        return 0.0, 0.0
    share = np.average([s for _, _, s in others], weights=beside)
    return sum(beside) / (end - begin), float(share)
