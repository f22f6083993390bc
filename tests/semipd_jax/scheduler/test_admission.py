"""What the queue refuses, and why."""

from scheduler_cases import make_request, make_scheduler


def test_a_full_queue_refuses_and_says_the_limit():
    scheduler, _ = make_scheduler(queue=2)
    refusals = [scheduler.submit("c", i, make_request(4, 8), now_s=0.0) for i in range(3)]
    assert refusals[:2] == [None, None]
    assert "2 requests are waiting" in refusals[2]


def test_tokens_are_limited_like_requests():
    scheduler, device = make_scheduler(max_num_queued_tokens=20, num_rows=2)
    assert scheduler.submit("c", 0, make_request(12, 4), now_s=0.0) is None
    refusal = scheduler.submit("c", 1, make_request(9, 4), now_s=0.0)
    assert "12 prompt tokens are waiting" in refusal
    assert "20" in refusal
    assert ("c", 1) not in scheduler.state.requests
    assert scheduler.submit("c", 2, make_request(8, 4), now_s=0.0) is None
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    scheduler.step_done(device.run(sent.step), now_s=0.0)
    assert scheduler.submit("c", 3, make_request(12, 4), now_s=0.0) is None


def test_chunks_that_are_still_to_be_computed_count():
    scheduler, _ = make_scheduler(max_num_queued_tokens=20, budget=8)
    scheduler.submit("c", 0, make_request(18, 4), now_s=0.0)
    assert scheduler.next_prefill(now_s=0.0) is not None
    assert scheduler.submit("c", 1, make_request(11, 4), now_s=0.0) is not None
    assert scheduler.submit("c", 1, make_request(10, 4), now_s=0.0) is None


def test_a_prompt_above_the_limit_is_served_when_it_is_alone():
    scheduler, _ = make_scheduler(max_num_queued_tokens=10)
    assert scheduler.submit("c", 0, make_request(18, 4), now_s=0.0) is None
    assert scheduler.submit("c", 1, make_request(1, 4), now_s=0.0) is not None


def test_tokens_whose_kv_was_given_up_are_to_be_computed_again():
    """A turn waits whose first five pages are cached, until others take them."""
    scheduler, device = make_scheduler(num_pages=8, num_rows=2, max_num_queued_tokens=30)
    first = make_request(20, 2)
    scheduler.submit("c", 0, first, now_s=0.0)
    while scheduler.state.requests:
        sent = scheduler.next_prefill(now_s=0.0) or scheduler.next_decode()
        assert sent is not None
        scheduler.step_done(device.run(sent.step), now_s=0.0)
    scheduler.submit("c", 1, make_request(20, 4, seed=1), now_s=0.0)
    scheduler.submit("c", 2, make_request((*first.prompt_token_ids, 1, 2), 2), now_s=0.0)
    [_, turn] = scheduler.state.waiting
    assert scheduler.state.num_found(turn) == 20
    for _ in range(2):
        sent = scheduler.next_prefill(now_s=0.0)
        assert sent is not None
        scheduler.step_done(device.run(sent.step), now_s=0.0)
    assert scheduler.state.num_found(turn) < 20
    refusal = scheduler.submit("c", 3, make_request(25, 2, seed=2), now_s=0.0)
    assert refusal is not None


def test_tokens_whose_kv_is_cached_are_not_to_be_computed():
    """A prompt of five pages stays cached; its next turn computes one page, not six."""
    scheduler, device = make_scheduler(max_num_queued_tokens=10)
    first = make_request(20, 2)
    assert scheduler.submit("c", 0, first, now_s=0.0) is None
    while scheduler.state.requests:
        sent = scheduler.next_prefill(now_s=0.0) or scheduler.next_decode()
        assert sent is not None
        scheduler.step_done(device.run(sent.step), now_s=0.0)
    assert scheduler.submit("c", 1, make_request(6, 2, seed=1), now_s=0.0) is None
    turn = (*first.prompt_token_ids, 1, 2)
    assert scheduler.submit("c", 2, make_request(turn, 2), now_s=0.0) is None
    assert scheduler.submit("c", 3, make_request(3, 2, seed=2), now_s=0.0) is not None, "6 + 2 + 3"
    assert scheduler.submit("c", 4, make_request(2, 2, seed=3), now_s=0.0) is None
