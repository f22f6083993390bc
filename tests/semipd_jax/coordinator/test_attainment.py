import pytest

from semipd_jax.coordinator.attainment import WINDOW_S, Attainment
from semipd_jax.messages import SloCounts
from semipd_jax.request import FinishReason, Request, Timings
from semipd_jax.scheduler.scheduler import Ending, Scheduler
from semipd_jax.scheduler.state import Limits
from semipd_jax.tuner.slo import SloTarget, SloTargets

LIMITS = Limits(
    page_size=16,
    num_pages=100,
    num_rows=9,
    max_model_len=64,
    max_num_batched_tokens=64,
    max_num_queued_reqs=8,
)
TARGETS = SloTargets(SloTarget(ttft_ms=100.0, tpot_ms=10.0), {5: SloTarget(ttft_ms=1000.0)})


def ended(
    *,
    queue_s=0.0,
    prefill_s=0.05,
    decode_s=0.05,
    num_tokens=11,
    reason=FinishReason.STOP,
    error=None,
    priority=0,
) -> Ending:
    scheduler = Scheduler(LIMITS)
    request = Request(request_id="r", prompt_token_ids=(1, 2), priority=priority)
    scheduler.submit("c", 1, request, now_s=0.0)
    state = scheduler.state.requests["c", 1]
    state.token_ids += [0] * num_tokens
    timings = Timings(queue_s, prefill_s, decode_s, 0)
    return Ending(state, reason, timings, error=error)


@pytest.mark.parametrize(
    ("ending", "counts"),
    [
        (ended(), SloCounts(1, 1, 1, 1)),
        (ended(queue_s=0.06), SloCounts(1, 0, 0, 1)),  # TTFT is queue and prefill
        (ended(decode_s=0.101), SloCounts(1, 0, 1, 0)),
        (ended(decode_s=0.101, num_tokens=12), SloCounts(1, 1, 1, 1)),
        (ended(decode_s=9.0, num_tokens=1), SloCounts(1, 1, 1, 1)),  # has no TPOT
        (ended(prefill_s=0.5, priority=5), SloCounts(1, 1, 1, 1)),
        (ended(error="a worker died", reason=FinishReason.ABORT), SloCounts(1, 0, 0, 0)),
        (ended(reason=FinishReason.ABORT), SloCounts(0, 0, 0, 0)),
        (ended(reason=FinishReason.ABORT, prefill_s=0.2, num_tokens=0), SloCounts(1, 0, 0, 0)),
        (ended(reason=FinishReason.ABORT, decode_s=0.2), SloCounts(1, 0, 0, 0)),
    ],
)
def test_each_request_is_judged_by_what_it_was_promised(ending, counts):
    attainment = Attainment()
    attainment.add(ending, TARGETS, 0.0)
    assert attainment.counts() == counts


@pytest.mark.parametrize(
    ("ending", "learns"),
    [
        (ended(queue_s=0.06), True),
        (ended(reason=FinishReason.ABORT), False),
        (ended(reason=FinishReason.ABORT, prefill_s=0.2, num_tokens=0), True),
        (ended(error="a worker died", reason=FinishReason.ABORT), False),
    ],
)
def test_policies_learn_of_who_left_after_a_promise_was_broken(ending, learns):
    """Else they would see only those who were served in time."""
    times = Attainment().add(ending, TARGETS, 0.0)
    assert (times is not None) == learns
    if times is not None:
        assert times.ttft_s > 0.1


def test_recent_requests_are_those_of_the_window():
    attainment = Attainment()
    for i in range(100):
        attainment.add(ended(prefill_s=0.001 * i), TARGETS, float(i))
    recent = attainment.recent(99.0)
    assert recent.num_ended == WINDOW_S + 1
    assert recent.ttft_s.p50 == pytest.approx(0.069)  # of 0.039 to 0.099
    assert recent.ttft_s.p90 == pytest.approx(0.093)
    assert recent.num_met == recent.num_ended
    assert attainment.counts().num_ended == 100


def test_requests_that_are_turned_away_are_misses():
    attainment = Attainment()
    attainment.missed(0.0)
    assert attainment.counts() == SloCounts(1, 0, 0, 0)
    recent = attainment.recent(1.0)
    assert (recent.num_ended, recent.num_met, recent.ttft_s) == (1, 0, None)


def test_failed_requests_are_recent_misses_without_times():
    attainment = Attainment()
    attainment.add(ended(error="a worker died", reason=FinishReason.ABORT), TARGETS, 0.0)
    recent = attainment.recent(1.0)
    assert (recent.num_ended, recent.num_met, recent.ttft_s, recent.tpot_s) == (1, 0, None, None)


def test_every_request_of_a_busy_minute_counts():
    attainment, ending = Attainment(), ended()
    for i in range(3000):
        attainment.add(ending, TARGETS, i / 100)
    attainment.missed(30.0)
    recent = attainment.recent(30.0)
    assert (recent.num_ended, recent.num_met) == (3001, 3000)
    assert attainment.recent(95.0).num_ended == 0
