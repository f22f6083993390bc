"""Admissions leave room for growth: preemptions stay rare, and rows do not stay empty for it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_cases import make_prompt, make_request, make_scheduler

from semipd_jax.messages import PrefillStep
from semipd_jax.request import Request, SamplingParams
from semipd_jax.scheduler import watermark
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Limits

PAGE_SIZE = 4
request_sizes = st.tuples(st.integers(0, 20), st.integers(1, 17), st.integers(0, 3))


@given(st.lists(request_sizes, min_size=1, max_size=6))
def test_the_peak_is_the_one_of_running_token_by_token(sizes):
    """`sizes`: growth, tokens now, pages that somebody else holds too, of each request."""
    growth, num_tokens, shared = (np.array(column, np.int32) for column in zip(*sizes, strict=True))
    held = -(-num_tokens // PAGE_SIZE)
    shared = np.minimum(shared, held)
    in_use = []
    for added in range(21):
        runs = growth >= added  # the page of the last token comes back after it
        now = -(-(num_tokens + added) // PAGE_SIZE) - held
        in_use.append(int(now[runs].sum() - (held - shared)[~runs].sum()))
    worst = max(in_use[: growth.max() + 1])
    assert watermark.peak_pages(growth, -num_tokens % PAGE_SIZE, held - shared, PAGE_SIZE) == worst


def run(requests) -> tuple[int, int, int]:
    """(preemptions, tokens prefilled, decode steps) of serving all, prefill before decode."""
    scheduler, device = make_scheduler(num_pages=25, num_rows=13, enable_prefix_caching=False)
    for handle, request in enumerate(requests):
        assert scheduler.submit("c", handle, request, now_s=0.0) is None
    prefilled = decode_steps = 0
    while sent := scheduler.next_prefill(now_s=0.0) or scheduler.next_decode():
        if isinstance(sent.step, PrefillStep):
            prefilled += len(sent.step.token_ids) // 4
        else:
            decode_steps += 1
        scheduler.step_done(device.run(sent.step), now_s=0.0)
    assert not scheduler.state.requests
    return scheduler.num_preemptions, prefilled, decode_steps


def without_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermark, "share_after_preemption", lambda share: 0.0)


def test_requests_that_grow_to_their_limit_hardly_preempt_each_other(monkeypatch):
    requests = [make_request(4, 20, seed=i) for i in range(80)]  # 6 pages each, of 24
    preempted, prefilled, steps = run(requests)
    without_growth(monkeypatch)
    thrashing = run(requests)
    assert thrashing[0] > 3 * preempted
    assert prefilled - 320 < 0.3 * (thrashing[1] - 320), "tokens computed again"
    assert steps < 1.2 * thrashing[2]


def test_requests_that_end_early_keep_the_rows_full(monkeypatch):
    stop = range(0, 50, 3)  # a third of all tokens
    requests = [make_request(4, 20, seed=i, stop=stop) for i in range(80)]
    _, _, steps = run(requests)
    without_growth(monkeypatch)
    assert steps < 1.2 * run(requests)[2]


def rows_admitted(most_tokens: int | None, growth_share: float) -> int:
    """Of 64 requests with one token each, under a model length of 131,072 and 1,000 pages."""
    limits = Limits(
        page_size=64,
        num_pages=1001,
        num_rows=65,
        max_model_len=131_072,
        max_num_batched_tokens=1024,
        max_num_queued_reqs=64,
    )
    scheduler = Scheduler(limits)
    scheduler.state.growth_share = growth_share
    for handle in range(64):
        request = Request(
            request_id=str(handle),
            prompt_token_ids=(handle,),
            sampling=SamplingParams(max_tokens=most_tokens, seed=0),
        )
        assert scheduler.submit("c", handle, request, now_s=0.0) is None
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    return len(sent.admitted)


def test_who_names_no_limit_is_not_expected_to_fill_the_model_s_length():
    assert rows_admitted(None, 0.0) == 64
    assert rows_admitted(None, 0.2) == rows_admitted(4096, 0.2) == 64
    assert rows_admitted(None, 1.0) == rows_admitted(4096, 1.0) == 1000 // 65


def test_pages_that_others_took_as_well_do_not_come_back():
    scheduler, device = make_scheduler(num_pages=9, num_rows=6)
    scheduler.submit("c", 0, make_request(16, 2), now_s=0.0)  # ends first
    sent = scheduler.next_prefill(now_s=0.0)
    scheduler.step_done(device.run(sent.step), now_s=0.0)
    for handle in (1, 2, 3):  # a page each, and one to grow into
        scheduler.submit("c", handle, make_request((*make_prompt(16), handle), 7), now_s=0.0)
    assert len(scheduler.next_prefill(now_s=0.0).admitted) == 2
    assert scheduler.next_prefill(now_s=0.0) is None, "nor after these are counted as running"


def test_a_share_is_raised_at_once_and_forgotten_slowly():
    share = watermark.share_after_preemption(0.0)
    for _ in range(300):
        share = watermark.share_after_step(share)
    assert 0.0 < share < watermark.share_after_preemption(0.0)
    for _ in range(301):
        share = watermark.share_after_step(share)
    assert share == 0.0
    for _ in range(10):
        share = watermark.share_after_preemption(share)
    assert share == 1.0
