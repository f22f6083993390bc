import pytest

from semipd_jax.coordinator.workers import LaneWorkers


@pytest.fixture
def workers() -> LaneWorkers:
    return LaneWorkers("decode", wanted=1.0, shares={"slow": 0.5, "fast": 1.0})


def test_the_closest_share_that_is_ready_gets_the_step(workers):
    for wanted, chosen in ((1.0, "fast"), (0.9, "fast"), (0.5, "slow"), (0.1, "slow")):
        workers.wanted = wanted
        assert workers.next_worker(2) == chosen
    workers.wanted = 0.75
    assert workers.next_worker(2) == "fast", "the larger of two that are equally close"
    assert LaneWorkers("decode").next_worker(2) is None


def test_a_move_waits_for_the_steps_in_flight(workers):
    workers.sent("fast", 1, now_s=0.0)
    workers.wanted = 0.5
    assert workers.next_worker(2) is None
    assert workers.answered("fast", 1, now_s=1.0)
    assert workers.next_worker(2) == "slow"
    workers.sent("slow", 2, now_s=1.0)
    assert (workers.share, workers.num_switches) == (0.5, 1)
    assert workers.next_worker(2) == "slow"
    assert not workers.answered("fast", 2, now_s=2.0), "a reply from who does not hold the step"


def test_depth_limits_the_steps_in_flight(workers):
    workers.sent("fast", 1, now_s=3.0)
    assert workers.next_worker(1) is None
    assert workers.next_worker(2) == "fast"
    workers.sent("fast", 2, now_s=4.0)
    assert workers.running_since_s == 3.0
    assert not workers.answered("fast", 2, now_s=5.0), "replies come in order"
    assert workers.answered("fast", 1, now_s=5.0)
    assert workers.running_since_s == 5.0


def test_only_the_holder_takes_steps_with_it(workers):
    workers.sent("fast", 1, now_s=0.0)
    assert workers.remove("slow") == []
    assert workers.remove("fast") == [1]
    assert workers.remove("fast") == []
    assert workers.next_worker(2) is None
    workers.shares["new"] = 1.0
    workers.sent("new", 2, now_s=0.0)
    assert workers.num_switches == 0, "a replacement is no switch"


def test_spare_workers_hold_nothing_and_are_not_wanted(workers):
    workers.sent("fast", 1, now_s=0.0)
    workers.wanted = 0.7
    assert workers.spare(frozenset()) == ["slow"]
    assert workers.spare(frozenset({0.5})) == []
    workers.answered("fast", 1, now_s=0.0)
    assert workers.spare(frozenset({0.5})) == ["fast"]
    workers.wanted = 1.0
    assert workers.spare(frozenset({0.5})) == []
