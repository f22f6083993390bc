"""What requests find of each other's KV, and of their own."""

import numpy as np
import pytest
from scheduler_cases import (
    PAGE_SIZE,
    Outcome,
    expected,
    make_prompt,
    make_request,
    make_scheduler,
    run_alone,
    run_to_end,
)

from semipd_jax.messages import PrefillStep
from semipd_jax.request import FinishReason
from semipd_jax.scheduler.scheduler import Scheduler


def prefill_of(scheduler: Scheduler, handle: int, request) -> PrefillStep:
    """The first step of a request that comes to an idle engine."""
    assert scheduler.submit("c", handle, request, now_s=0.0) is None
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    return sent.step


def num_computed(step: PrefillStep) -> int:
    return len(step.token_ids) // 4


def history(step: PrefillStep) -> list[tuple[int, list[int]]]:
    return [(h.row, np.frombuffer(h.token_ids, np.int32).tolist()) for h in step.history]


def test_the_next_turn_finds_what_prefill_and_decode_wrote():
    scheduler, device = make_scheduler()
    first = make_request(6, 8)
    output = run_alone(scheduler, device, 0, first)
    turn = (*first.prompt_token_ids, *output, 1, 2, 3)  # 6 + 8 + 3 tokens; 13 of them have KV
    second = make_request(turn, 4, seed=1)
    step = prefill_of(scheduler, 1, second)
    assert history(step) == [(scheduler.state.requests["c", 1].row, list(turn[:12]))]
    assert num_computed(step) == 5
    outcome = Outcome()
    outcome.take(scheduler.step_done(device.run(step), now_s=0.0))
    run_to_end(scheduler, device, outcome)
    assert outcome.tokens[1] == expected(second)[0]
    assert (scheduler.prefix_cache_queries, scheduler.prefix_cache_hits) == (6 + 17, 12)


def test_what_was_computed_twice_is_found_when_the_first_copy_is_gone():
    scheduler, device = make_scheduler(num_pages=10)
    first, second = make_request(8, 1), make_request(8, 12)
    for handle, request in enumerate((first, second)):
        scheduler.submit("c", handle, request, now_s=0.0)
    outcome = Outcome()
    outcome.take(scheduler.step_done(device.run(scheduler.next_prefill(now_s=0.0).step), now_s=0.0))
    assert outcome.endings.keys() == {0}, "its two pages are those that can be found"
    scheduler.submit("c", 2, make_request(20, 1, seed=1), now_s=0.0)
    run_to_end(scheduler, device, outcome)
    turn = (*second.prompt_token_ids, *outcome.tokens[1])
    assert num_computed(prefill_of(scheduler, 3, make_request((*turn, 1), 1))) == 5


@pytest.mark.parametrize("length", [PAGE_SIZE, 2 * PAGE_SIZE, 2 * PAGE_SIZE + 1])
def test_the_same_prompt_again_computes_its_last_token_at_least(length):
    scheduler, device = make_scheduler()
    request = make_request(length, 3)
    tokens = run_alone(scheduler, device, 0, request)
    step = prefill_of(scheduler, 1, request)
    assert num_computed(step) == (length - 1) % PAGE_SIZE + 1
    outcome = Outcome()
    outcome.take(scheduler.step_done(device.run(step), now_s=0.0))
    run_to_end(scheduler, device, outcome)
    assert outcome.tokens[1] == tokens


def test_salts_separate_and_join():
    scheduler, device = make_scheduler()
    run_alone(scheduler, device, 0, make_request(13, 1, cache_salt="a"))
    assert num_computed(prefill_of(scheduler, 1, make_request(13, 1, cache_salt="b"))) == 13
    scheduler.abort("c", 1, FinishReason.ABORT, now_s=0.0)
    assert num_computed(prefill_of(scheduler, 2, make_request(13, 1, cache_salt="a"))) == 1


def test_switched_off_nothing_is_kept():
    scheduler, device = make_scheduler(enable_prefix_caching=False)
    run_alone(scheduler, device, 0, make_request(13, 8))
    assert scheduler.state.pages.num_sealed == 0
    step = prefill_of(scheduler, 1, make_request(13, 8))
    assert (num_computed(step), step.history) == (13, ())
    assert (scheduler.prefix_cache_queries, scheduler.prefix_cache_hits) == (0, 0)


def test_requests_that_run_at_once_share_their_prompt():
    scheduler, device = make_scheduler(num_pages=12, num_rows=5)
    prompt = make_prompt(13)
    outcome = Outcome()
    step = prefill_of(scheduler, 0, make_request(prompt, 6, seed=0))
    outcome.take(scheduler.step_done(device.run(step), now_s=0.0))
    for handle in range(1, 4):  # 4 x 5 pages would not fit
        scheduler.submit("c", handle, make_request(prompt, 6, seed=handle), now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    assert len(sent.admitted) == 3
    outcome.take(scheduler.step_done(device.run(sent.step), now_s=0.0))
    scheduler.state.check()
    run_to_end(scheduler, device, outcome)
    assert scheduler.num_preemptions == 0
    for handle in range(4):
        assert outcome.tokens[handle] == expected(make_request(prompt, 6, seed=handle))[0]


def test_a_preempted_request_finds_its_own_pages_again():
    scheduler, device = make_scheduler(num_pages=9, num_rows=3)
    outcome = Outcome()
    for handle in range(2):
        scheduler.submit("c", handle, make_request(9, 15, seed=handle), now_s=0.0)
    found = []
    while sent := scheduler.next_prefill(now_s=0.0) or scheduler.next_decode():
        found += [r.num_cached for r in sent.admitted if r.num_preemptions]
        outcome.take(scheduler.step_done(device.run(sent.step), now_s=0.0))
        scheduler.state.check()
    assert found
    assert max(found) >= PAGE_SIZE
    for handle in range(2):
        assert outcome.tokens[handle] == expected(make_request(9, 15, seed=handle))[0]
    assert scheduler.prefix_cache_hits == 0, "what it finds of its own is not a hit"


def test_what_an_aborted_request_had_computed_stays():
    scheduler, device = make_scheduler(budget=8)
    step = prefill_of(scheduler, 0, make_request(20, 4))
    scheduler.step_done(device.run(step), now_s=0.0)
    late = scheduler.next_prefill(now_s=0.0)
    assert late is not None
    scheduler.abort("c", 0, FinishReason.ABORT, now_s=0.0)
    scheduler.step_done(device.run(late.step), now_s=0.0)
    scheduler.state.check()
    assert scheduler.state.pages.num_available == 19
    assert history(prefill_of(scheduler, 1, make_request(20, 4)))[0][1] == list(make_prompt(8))


def test_what_a_lost_worker_did_not_report_is_not_found():
    scheduler, device = make_scheduler(budget=8)
    steps = [prefill_of(scheduler, 0, make_request(20, 4))]
    scheduler.step_done(device.run(steps.pop()), now_s=0.0)
    for _ in range(2):
        sent = scheduler.next_prefill(now_s=0.0)
        assert sent is not None
        steps.append(sent.step)
    scheduler.worker_lost([step.step_id for step in steps], now_s=0.0)
    assert scheduler.state.pages.num_sealed == 2
    again = scheduler.next_prefill(now_s=0.0)
    assert again is not None
    assert again.step.token_ids == steps[0].token_ids


def test_the_first_chunk_after_a_cached_prefix_is_lost_and_brings_it_again():
    scheduler, device = make_scheduler()
    run_alone(scheduler, device, 0, make_request(13, 1))
    lost = prefill_of(scheduler, 1, make_request(13, 4))
    scheduler.worker_lost([lost.step_id], now_s=0.0)
    again = scheduler.next_prefill(now_s=0.0)
    assert again is not None
    assert history(again.step) == history(lost) != []
