"""The verdicts of `benchmarks.shares`, on made-up gaps with a known answer."""

import numpy as np
import pytest

from benchmarks.shares import added_p99_ms, estimate, p99_ratio, summarise


def rounds(added_s: float, count: int = 500):
    """Three of them. Gaps are 5 ms with exponential noise; a change adds the same to each."""
    rng = np.random.default_rng(1)

    def gaps():
        return 0.005 + rng.exponential(0.0005, count)

    return [(gaps() + added_s, gaps()) for _ in range(3)]


@pytest.mark.parametrize("added_ms", [0.0, 1.0, 4.0])
def test_added_time_is_found(added_ms):
    found = estimate(rounds(added_ms / 1000), added_p99_ms, target=2.0)
    assert found.low <= added_ms <= found.high
    assert abs(found.value - added_ms) < 0.5
    assert found.is_met == (added_ms < 2.0)
    assert len(found.by_round) == 3


def test_ratio_is_found():
    found = estimate(rounds(0.0073), p99_ratio, target=1.5)
    assert 1.8 < found.low <= found.value <= found.high < 2.2
    assert not found.is_met


def test_result_has_the_numbers_that_are_promised(capsys):
    found = summarise(rounds(0.001), rounds(0.0))
    on, beside = found["on the ladder"], found["beside the ladder"]
    assert on["added_p99_ms"].keys() == {"value", "low", "high", "by_round", "target", "is_met"}
    assert (on["added_p99_ms"]["target"], beside["p99_ratio"]["target"]) == (2.0, 1.5)
    assert (on["move"]["count"], beside["undisturbed"]["count"]) == (1500, 1500)
    assert abs(beside["p99_ratio"]["value"] - 1) < 0.2
    assert "target 2.0: met" in capsys.readouterr().out
