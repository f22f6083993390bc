"""The scheduler against a device that executes late, out of step with it, and dies."""

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from scheduler_cases import (
    Outcome,
    expected,
    make_request,
    make_scheduler,
    run_alone,
    run_to_end,
)
from scheduler_machine import Serving

from semipd_jax.messages import ROW_SAMPLING, PrefillStep, StepLogprobs
from semipd_jax.request import MAX_LOGPROBS, FinishReason, Request, SamplingParams
from semipd_jax.scheduler.state import MAX_CRASHES, Stage


@pytest.mark.parametrize("num_pages", [7, 9, 40])
def test_tokens_are_those_of_each_request_alone(num_pages):
    scheduler, device = make_scheduler(num_pages=num_pages)
    requests = [make_request(1 + 3 * i % 13, 1 + 5 * i % 11, seed=i, stop=[3]) for i in range(12)]
    outcome = Outcome()
    for handle, request in enumerate(requests):
        assert scheduler.submit("c", handle, request, now_s=0.0) is None
    run_to_end(scheduler, device, outcome)
    for handle, request in enumerate(requests):
        tokens, reason = expected(request)
        assert outcome.tokens[handle] == tokens
        assert outcome.endings[handle].reason is reason
    assert scheduler.state.pages.num_available == num_pages - 1


def test_full_pool_preempts_the_youngest_and_loses_nothing():
    scheduler, device = make_scheduler(num_pages=8, num_rows=5)
    outcome = Outcome()
    requests = [make_request(4, 20, seed=i) for i in range(4)]
    for handle, request in enumerate(requests):
        scheduler.submit("c", handle, request, now_s=0.0)
    run_to_end(scheduler, device, outcome)
    assert scheduler.num_preemptions > 0
    assert outcome.endings[0].timings.num_preemptions == 0, "the oldest was preempted"
    assert [outcome.tokens[h] for h in range(4)] == [expected(r)[0] for r in requests]


def test_prompt_longer_than_the_budget_comes_in_chunks():
    scheduler, device = make_scheduler(budget=8)
    scheduler.submit("c", 0, make_request(20, 2), now_s=0.0)
    lengths = []
    while sent := scheduler.next_prefill(now_s=0.0):
        lengths.append(len(sent.step.token_ids) // 4)
        device.run(sent.step)
    assert lengths == [8, 8, 4]


def test_decode_is_planned_ahead_of_replies_up_to_the_limit():
    scheduler, device = make_scheduler()
    scheduler.submit("c", 0, make_request(4, 3), now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    scheduler.step_done(device.run(sent.step), now_s=0.0)
    steps = [scheduler.next_decode(), scheduler.next_decode()]
    assert all(steps)
    assert scheduler.next_decode() is None, "the third output token is the last"
    outcome = Outcome()
    for step in steps:
        outcome.take(scheduler.step_done(device.run(step.step), now_s=0.0))
    assert outcome.endings[0].reason is FinishReason.LENGTH


def test_pages_of_an_aborted_request_wait_for_its_steps():
    scheduler, device = make_scheduler()
    scheduler.submit("c", 0, make_request(4, 8), now_s=0.0)
    free = scheduler.state.pages.num_available
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    result = scheduler.abort("c", 0, FinishReason.ABORT, now_s=0.0)
    assert [e.reason for e in result.endings] == [FinishReason.ABORT]
    assert scheduler.state.pages.num_available == free - 1
    late = scheduler.step_done(device.run(sent.step), now_s=0.0)
    assert (late.tokens, late.endings) == ([], [])
    assert scheduler.state.pages.num_available == free
    scheduler.state.check()


def test_decode_goes_on_when_the_pages_to_come_back_are_too_few():
    scheduler, device = make_scheduler(num_pages=10, budget=32)
    requests = [make_request(9, 12, seed=i) for i in range(2)]  # 3 pages each, 5 in the end
    for handle, request in enumerate(requests):
        scheduler.submit("c", handle, request, now_s=0.0)
    outcome = Outcome()
    outcome.take(scheduler.step_done(device.run(scheduler.next_prefill(now_s=0.0).step), now_s=0.0))
    scheduler.submit("c", 2, make_request(4, 1, seed=2), now_s=0.0)
    assert scheduler.next_prefill(now_s=0.0) is not None, "which is not answered"
    scheduler.abort("c", 2, FinishReason.ABORT, now_s=0.0)
    assert scheduler.state.num_quarantined_pages == 1
    while sent := scheduler.next_decode():
        outcome.take(scheduler.step_done(device.run(sent.step), now_s=0.0))
    assert outcome.tokens[0] == expected(requests[0])[0]
    assert scheduler.state.requests["c", 1].num_preemptions == 1


def test_who_waits_for_a_prefill_step_is_no_cheap_victim():
    scheduler, device = make_scheduler(num_pages=13, budget=12)
    for handle in range(2):
        scheduler.submit("c", handle, make_request(9, 12, seed=handle), now_s=0.0)
        sent = scheduler.next_prefill(now_s=0.0)
        scheduler.step_done(device.run(sent.step), now_s=0.0)
    scheduler.submit("c", 2, make_request(12, 1, seed=2), now_s=0.0)
    assert scheduler.next_prefill(now_s=0.0) is not None, "which is not answered"
    while not scheduler.num_preemptions:
        sent = scheduler.next_decode()
        scheduler.step_done(device.run(sent.step), now_s=0.0)
    stages = {handle: r.stage for (_, handle), r in scheduler.state.requests.items()}
    assert stages == {0: Stage.DECODING, 1: Stage.WAITING, 2: Stage.PREFILLING}


def test_pages_in_quarantine_count_once_and_only_if_nobody_else_holds_them():
    scheduler, device = make_scheduler()
    request = make_request(13, 1)
    run_alone(scheduler, device, 0, request)  # of 4 pages, 3 are full and will be shared
    for handle in (1, 2):
        scheduler.submit("c", handle, request, now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    state = scheduler.state
    for handle, num_pages in ((1, 1), (2, 5)):
        scheduler.abort("c", handle, FinishReason.ABORT, now_s=0.0)
        assert (state.pages.num_available, state.num_quarantined_pages) == (14, num_pages)
    scheduler.step_done(device.run(sent.step), now_s=0.0)
    assert (state.pages.num_available, state.num_quarantined_pages) == (19, 0)


def test_min_tokens_forbids_stop_ids_until_reached():
    scheduler, device = make_scheduler()
    sampling = SamplingParams(
        max_tokens=4, min_tokens=2, stop_token_ids=(5, 6), logit_bias=((9, 1.0),)
    )
    request = Request(request_id="r", prompt_token_ids=(1, 2), sampling=sampling)
    scheduler.submit("c", 0, request, now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    forbidden = []
    step = sent.step
    while True:
        bias = step.bias
        ids = np.frombuffer(bias.token_ids, np.int32)
        values = np.frombuffer(bias.values, np.float32)
        forbidden.append({int(i) for i, v in zip(ids, values, strict=True) if v == -np.inf})
        scheduler.step_done(device.run(step), now_s=0.0)
        following = scheduler.next_decode()
        if following is None:
            break
        step = following.step
    assert forbidden[:2] == [{5, 6}, {5, 6}]
    assert not any(forbidden[2:])


def test_a_request_that_kills_workers_is_given_up():
    scheduler, _ = make_scheduler()
    scheduler.submit("c", 0, make_request(4, 8), now_s=0.0)
    results = []
    while sent := scheduler.next_prefill(now_s=0.0):
        results.append(scheduler.worker_lost([sent.step.step_id], now_s=0.0))
        scheduler.state.check()
    assert len(results) == MAX_CRASHES
    assert not any(r.endings for r in results[:-1])
    assert "died" in results[-1].endings[0].error
    assert not scheduler.state.requests


def test_steps_of_workers_that_are_not_to_blame_are_no_crashes():
    scheduler, device = make_scheduler()
    request = make_request(4, 8)
    scheduler.submit("c", 0, request, now_s=0.0)
    for _ in range(MAX_CRASHES):
        sent = scheduler.next_prefill(now_s=0.0)
        assert sent is not None
        result = scheduler.worker_lost([sent.step.step_id], now_s=0.0, is_to_blame=False)
        assert not result.endings
        scheduler.state.check()
    assert not scheduler.state.requests["c", 0].is_suspect
    outcome = Outcome()
    run_to_end(scheduler, device, outcome)
    assert outcome.tokens[0] == expected(request)[0]


def test_only_the_request_to_blame_is_given_up():
    scheduler, device = make_scheduler(num_pages=40, num_rows=6)
    requests = [make_request(4, 10, seed=i) for i in range(4)]
    outcome = Outcome()
    for handle, request in enumerate(requests):
        scheduler.submit("c", handle, request, now_s=0.0)
    while sent := scheduler.next_prefill(now_s=0.0):
        outcome.take(scheduler.step_done(device.run(sent.step), now_s=0.0))
    poison = scheduler.state.requests["c", 2].row
    for _ in range(200):
        sent = scheduler.next_decode()
        if sent is None:
            break
        if poison in np.frombuffer(sent.step.rows, np.int32) and 2 not in outcome.endings:
            outcome.take(scheduler.worker_lost([sent.step.step_id], now_s=0.0))
        else:
            outcome.take(scheduler.step_done(device.run(sent.step), now_s=0.0))
        scheduler.state.check()
    assert outcome.endings[2].error is not None
    for handle in (0, 1, 3):
        assert outcome.tokens[handle] == expected(requests[handle])[0]


def test_a_preempted_request_keeps_its_place_and_its_prompt():
    scheduler, device = make_scheduler(num_pages=8, num_rows=4)
    for handle in range(3):
        scheduler.submit("c", handle, make_request(4, 20, seed=handle), now_s=0.0)
    readmitted = []
    while sent := scheduler.next_prefill(now_s=0.0) or scheduler.next_decode():
        if isinstance(sent.step, PrefillStep):
            prompt_lens = np.frombuffer(sent.step.sampling, ROW_SAMPLING)["prompt_len"]
            assert set(prompt_lens.tolist()) == {4}
            readmitted += [r.handle for r in sent.admitted if r.num_preemptions]
        if scheduler.state.waiting and scheduler.state.waiting[0].num_preemptions:
            scheduler.submit("c", 9, make_request(4, 1), now_s=0.0)
            waiting = [r.handle for r in scheduler.state.waiting]
            assert waiting == sorted(waiting), "a later request got ahead"
            scheduler.abort("c", 9, FinishReason.ABORT, now_s=0.0)
        scheduler.step_done(device.run(sent.step), now_s=0.0)
    assert readmitted


def test_logprobs_go_to_the_rows_that_asked():
    scheduler, device = make_scheduler()
    for handle, num in enumerate((None, 0, 2)):
        sampling = SamplingParams(max_tokens=1, logprobs=num)
        request = Request(request_id=str(handle), prompt_token_ids=(1, 2, 3), sampling=sampling)
        scheduler.submit("c", handle, request, now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    asked = np.frombuffer(sent.step.sampling, ROW_SAMPLING)["num_logprobs"].tolist()
    assert asked == [-1, 0, 2]
    ids = np.arange(3 * MAX_LOGPROBS, dtype=np.int32)
    logprobs = StepLogprobs(
        sampled=np.array([-1.0, -2.0, -3.0], np.float32).tobytes(),
        top_ids=ids.tobytes(),
        top_logprobs=(-ids.astype(np.float32)).tobytes(),
    )
    reply = msgspec.structs.replace(device.run(sent.step), logprobs=logprobs)
    got = [token.logprob for token in scheduler.step_done(reply, now_s=0.0).tokens]
    first = 2 * MAX_LOGPROBS
    assert got[0] is None
    assert got[1] is not None
    assert (got[1].logprob, got[1].top) == (-2.0, ())
    assert got[2] is not None
    assert got[2].logprob == -3.0
    assert got[2].top == ((first, -float(first)), (first + 1, -float(first + 1)))


def test_crashes_between_steps_that_succeed_are_forgiven():
    scheduler, device = make_scheduler()
    request = make_request(4, 8)
    scheduler.submit("c", 0, request, now_s=0.0)
    outcome = Outcome()
    for _ in range(8):
        for _ in range(MAX_CRASHES - 1):
            sent = scheduler.next_prefill(now_s=0.0) or scheduler.next_decode()
            scheduler.worker_lost([sent.step.step_id], now_s=0.0)
        sent = scheduler.next_prefill(now_s=0.0) or scheduler.next_decode()
        outcome.take(scheduler.step_done(device.run(sent.step), now_s=0.0))
    assert outcome.tokens[0] == expected(request)[0]


Serving.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestServing = Serving.TestCase
