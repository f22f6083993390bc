"""Who is prefilled first, whom nobody may pass for ever, and who gives way."""

import numpy as np
import pytest
from scheduler_cases import make_prompt, make_request, make_scheduler

from semipd_jax.messages import PrefillStep, StepDone
from semipd_jax.request import FinishReason, Request, SamplingParams
from semipd_jax.scheduler.decode import plan_decode
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Limits

TOKENS_PER_S = 1000.0
LONG, SHORT = 2000, 100


def answer(scheduler: Scheduler, step) -> None:
    """The device's reply, whatever the tokens are."""
    token_ids = bytes(len(step.rows))
    scheduler.step_done(StepDone("", step.step_id, token_ids, 0.0, 0), now_s=0.0)


def order_of(scheduler: Scheduler) -> list[int]:
    """Handles in the order in which their prefill ends."""
    ended = []
    while sent := scheduler.next_prefill(now_s=0.0):
        ended += [
            chunk.request.handle
            for chunk in scheduler.state.in_flight[sent.step.step_id].chunks
            if chunk.samples
        ]
        answer(scheduler, sent.step)
    return ended


def submit_all(scheduler: Scheduler, *requests: Request, gap_s: float = 0.0) -> None:
    for handle, request in enumerate(requests):
        assert scheduler.submit("c", handle, request, now_s=handle * gap_s) is None


def lengths(*prompt_lens: int, **fields) -> list[Request]:
    return [make_request(n, 1, seed=i, **fields) for i, n in enumerate(prompt_lens)]


def test_fcfs_is_the_order_of_arrival():
    scheduler, _ = make_scheduler(budget=8, num_pages=40)
    submit_all(scheduler, *lengths(20, 3, 9, 1))
    assert order_of(scheduler) == [0, 1, 2, 3]


def test_spf_takes_the_shortest_first_and_the_earlier_of_equals():
    scheduler, _ = make_scheduler(budget=8, num_pages=40, policy="spf")
    submit_all(scheduler, *lengths(20, 3, 9, 3))
    assert order_of(scheduler) == [1, 3, 2, 0]


def test_spf_counts_what_is_left_not_what_was_asked_for():
    """A prompt under way has become the shortest; one whose prefix is cached is short."""
    scheduler, _ = make_scheduler(budget=8, num_pages=60, policy="spf")
    submit_all(scheduler, make_request(20, 1))
    for _ in range(2):
        sent = scheduler.next_prefill(now_s=0.0)
        assert sent is not None
        answer(scheduler, sent.step)
    scheduler.submit("c", 1, make_request(6, 1, seed=1), now_s=0.0)
    scheduler.submit("c", 2, make_request((*make_prompt(16), 7), 1), now_s=0.0)
    assert order_of(scheduler) == [2, 0, 1]


def test_with_age_a_long_prompt_comes_before_shorter_ones():
    scheduler, _ = make_scheduler(budget=8, num_pages=40, policy="spf", ageing_tokens_per_s=2.0)
    submit_all(scheduler, *lengths(20, 3, 3), gap_s=8.0)  # 17 tokens more are 8.5 s of age
    assert order_of(scheduler) == [1, 0, 2]


@pytest.mark.parametrize("policy", ["fcfs", "spf"])
def test_lower_priorities_come_first_under_every_policy(policy):
    scheduler, _ = make_scheduler(budget=8, num_pages=40, policy=policy)
    requests = [
        make_request(n, 1, seed=n, priority=priority)
        for n, priority in ((3, 5), (20, 0), (6, -1), (9, 0))
    ]
    submit_all(scheduler, *requests)
    assert order_of(scheduler) == ([2, 1, 3, 0] if policy == "fcfs" else [2, 3, 1, 0])


def test_a_request_that_does_not_fit_is_not_passed():
    scheduler, device = make_scheduler(num_pages=8, num_rows=5, policy="spf")
    scheduler.submit("c", 0, make_request(16, 8), now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    scheduler.step_done(device.run(sent.step), now_s=0.0)
    scheduler.submit("c", 1, make_request(12, 8, seed=1, priority=-1), now_s=0.0)
    scheduler.submit("c", 2, make_request(1, 1, seed=2), now_s=0.0)
    assert scheduler.next_prefill(now_s=0.0) is None
    scheduler.abort("c", 1, FinishReason.ABORT, now_s=0.0)
    assert scheduler.next_prefill(now_s=0.0) is not None


def simulate(*, ageing_tokens_per_s: float, load: float, seconds: float) -> tuple[float, int]:
    """One long prompt among short ones that keep coming, on a device of TOKENS_PER_S.

    Returns when the long one's prefill ends (infinity if it does not within `seconds`), and how
    many tokens had come by the time that nobody who comes later may pass it.
    """
    limits = Limits(
        page_size=16, num_pages=20_000, num_rows=1000, max_model_len=4096,
        max_num_batched_tokens=200, max_num_queued_reqs=100_000, policy="spf",
        ageing_tokens_per_s=ageing_tokens_per_s, enable_prefix_caching=False,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    gap_s = SHORT / (load * TOKENS_PER_S)
    arrivals = [(i * gap_s, SHORT) for i in range(int(seconds / gap_s))]
    arrivals.append((1.0, LONG))
    arrivals.sort()
    ahead = sum(n for s, n in arrivals if s <= 1.0 + LONG / ageing_tokens_per_s)
    now = 0.0
    pending = list(enumerate(arrivals))
    while now < seconds:
        while pending and pending[0][1][0] <= now:
            handle, (arrival_s, length) = pending.pop(0)
            sampling = SamplingParams(max_tokens=1, seed=0)
            request = Request(
                request_id=str(handle), prompt_token_ids=(1,) * length, sampling=sampling
            )
            scheduler.submit("c", handle, request, now_s=arrival_s)
        sent = scheduler.next_prefill(now_s=now)
        if sent is None:
            now = pending[0][1][0] if pending else seconds
            continue
        now += len(sent.step.token_ids) / 4 / TOKENS_PER_S
        chunks = scheduler.state.in_flight[sent.step.step_id].chunks
        if any(c.request.num_prompt == LONG and c.samples for c in chunks):
            return now, ahead
        answer(scheduler, sent.step)
    return float("inf"), ahead


@pytest.mark.parametrize("load", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("ageing_tokens_per_s", [200.0, 1000.0])
def test_nobody_starves(load, ageing_tokens_per_s):
    """A long prompt waits at most for what came before its age counts for more than its length,
    also on a device that more is asked of than it can do."""
    done_s, ahead = simulate(ageing_tokens_per_s=ageing_tokens_per_s, load=load, seconds=60.0)
    step_s = 200 / TOKENS_PER_S
    idle_s = 1.0  # what may go unused before the long prompt comes
    assert done_s <= ahead / TOKENS_PER_S + idle_s + step_s


def test_without_ageing_it_would_starve():
    done_s, _ = simulate(ageing_tokens_per_s=1e-6, load=1.3, seconds=60.0)
    assert done_s == float("inf")


# ---------------------------------------------------------------- who gives way


def decoding(scheduler: Scheduler, device, *requests: Request) -> None:
    """Brings all of them to decode, in this order."""
    for handle, request in enumerate(requests):
        assert scheduler.submit("c", handle, request, now_s=0.0) is None
        sent = scheduler.next_prefill(now_s=0.0)
        assert isinstance(sent.step, PrefillStep)
        scheduler.step_done(device.run(sent.step), now_s=0.0)


def first_victims(scheduler: Scheduler, device) -> list[int]:
    """Decodes until somebody has to give way."""
    for _ in range(100):
        plan = plan_decode(scheduler.state)
        assert plan is not None
        if plan.victims:
            return [victim.handle for victim in plan.victims]
        sent = scheduler.next_decode()
        scheduler.step_done(device.run(sent.step), now_s=0.0)
    raise AssertionError("nobody gave way")


def test_the_cheapest_to_compute_again_gives_way_first_even_if_older():
    scheduler, device = make_scheduler(num_pages=9, num_rows=4)
    decoding(scheduler, device, make_request(5, 16), make_request(13, 10, seed=1))
    assert first_victims(scheduler, device) == [0]


def test_equally_cheap_the_youngest_gives_way():
    scheduler, device = make_scheduler(num_pages=8, num_rows=4)
    decoding(scheduler, device, *(make_request(5, 16, seed=i) for i in range(2)))
    assert first_victims(scheduler, device) == [1]


def test_what_others_hold_too_need_not_be_computed_again():
    """The longest two share all but their ends."""
    scheduler, device = make_scheduler(num_pages=12, num_rows=4)
    shared = make_prompt(12)
    requests = [make_request((*shared, i), 10, seed=i) for i in range(2)]
    decoding(scheduler, device, *requests, make_request(9, 14, seed=2))
    assert first_victims(scheduler, device)[0] == 1


def test_the_least_important_gives_way_whatever_it_costs():
    scheduler, device = make_scheduler(num_pages=9, num_rows=4)
    requests = make_request(13, 10, priority=1), make_request(5, 16, seed=1)
    decoding(scheduler, device, *requests)
    assert first_victims(scheduler, device) == [0]


def test_rows_of_a_step_are_those_of_the_plan():
    scheduler, device = make_scheduler(num_pages=9, num_rows=4)
    decoding(scheduler, device, make_request(5, 16), make_request(13, 10, seed=1))
    first_victims(scheduler, device)
    sent = scheduler.next_decode()
    rows = np.frombuffer(sent.step.rows, np.int32).tolist()
    assert rows == [scheduler.state.requests["c", 1].row]
