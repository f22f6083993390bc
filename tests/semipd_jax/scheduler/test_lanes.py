"""What each lane's next step is made of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_cases import MAX_LEN, Outcome, expected, make_request, make_scheduler

from semipd_jax.config import LANES
from semipd_jax.messages import DecodeStep, MixedStep, PrefillStep, parts
from semipd_jax.scheduler.lanes import next_step
from semipd_jax.scheduler.state import MAX_CRASHES


def num_tokens(step) -> int:
    prompt = sum(len(p.token_ids) // 4 for p in parts(step) if isinstance(p, PrefillStep))
    return prompt + sum(len(p.rows) // 4 for p in parts(step) if isinstance(p, DecodeStep))


def rows(part) -> list[int]:
    return np.frombuffer(part.rows, np.int32).tolist()


def served(mode: str, requests, **limits):
    """All steps until the requests end, two in flight in each lane; checks the tokens."""
    scheduler, device = make_scheduler(num_pages=40, **limits)
    for handle, request in enumerate(requests):
        assert scheduler.submit("c", handle, request, now_s=0.0) is None
    steps, outcome = [], Outcome()
    queues = {lane: [] for lane in LANES[mode]}
    while scheduler.state.requests:
        for lane, queue in queues.items():
            while len(queue) < 2 and (sent := next_step(scheduler, lane, now_s=0.0)):
                queue.append(sent.step)
        for queue in queues.values():
            if queue:
                steps.append(queue.pop(0))
                outcome.take(scheduler.step_done(device.run(steps[-1]), now_s=0.0))
    assert [outcome.tokens[i] for i in range(len(requests))] == [expected(r)[0] for r in requests]
    return scheduler, steps


REQUESTS = st.lists(
    st.tuples(st.integers(1, MAX_LEN - 8), st.integers(1, 8)), min_size=1, max_size=6
)


@given(lengths=REQUESTS, budget=st.integers(5, 12))
@settings(max_examples=30)
def test_mixed_steps_take_all_rows_and_keep_to_the_budget(lengths, budget):
    requests = [make_request(*each, seed=i) for i, each in enumerate(lengths)]
    scheduler, steps = served("chunked", requests, budget=budget)
    assert max(map(num_tokens, steps)) <= budget
    assert scheduler.num_steps["prefill"] + scheduler.num_steps["decode"] == len(steps) + sum(
        isinstance(step, MixedStep) for step in steps
    )


@given(lengths=REQUESTS)
@settings(max_examples=30)
def test_colocated_steps_are_of_one_phase(lengths):
    requests = [make_request(*each, seed=i) for i, each in enumerate(lengths)]
    _, steps = served("colocated", requests, budget=8)
    assert not any(isinstance(step, MixedStep) for step in steps)


def decoding(budget: int):
    """A scheduler with two requests that decode, and a device."""
    scheduler, device = make_scheduler(num_pages=40, budget=budget)
    for handle in range(2):
        scheduler.submit("c", handle, make_request(4, 12, seed=handle), now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    scheduler.step_done(device.run(sent.step), now_s=0.0)
    return scheduler, device


def test_a_long_prompt_rides_on_decode_steps():
    scheduler, _ = decoding(budget=8)
    scheduler.submit("c", 2, make_request(15, 4, seed=2), now_s=0.0)
    steps = [next_step(scheduler, "chunked", now_s=0.0).step for _ in range(4)]
    assert [type(step) for step in steps] == [MixedStep, MixedStep, MixedStep, DecodeStep]
    assert [num_tokens(step) for step in steps] == [8, 8, 5, 2]
    assert len({step.step_id for step in steps}) == 4
    for step in steps[:3]:
        assert step.prefill.step_id == step.decode.step_id
        assert not set(rows(step.prefill)) & set(rows(step.decode))


def test_a_long_prompt_goes_before_decode_steps_where_prefill_is_first():
    scheduler, _ = decoding(budget=8)
    scheduler.submit("c", 2, make_request(15, 4, seed=2), now_s=0.0)
    steps = [next_step(scheduler, "colocated", now_s=0.0).step for _ in range(3)]
    assert [type(step) for step in steps] == [PrefillStep, PrefillStep, DecodeStep]


@pytest.mark.parametrize("mode", ["colocated", "chunked"])
def test_only_the_suspect_of_a_crash_runs_alone_and_is_given_up(mode):
    scheduler, device = decoding(budget=8)
    deadly = make_request(6, 4, seed=2)
    scheduler.submit("c", 2, deadly, now_s=0.0)
    outcome = Outcome()
    for _ in range(100):
        sent = next_step(scheduler, mode, now_s=0.0)
        if sent is None:
            break
        state = scheduler.state.requests.get(("c", 2))
        named = [row for part in parts(sent.step) for row in rows(part)]
        if state is not None and state.row in named:
            if state.num_crashes == MAX_CRASHES - 1:
                assert named == [state.row], "a suspect does not run alone"
            outcome.take(scheduler.worker_lost([sent.step.step_id], now_s=0.0))
        else:
            outcome.take(scheduler.step_done(device.run(sent.step), now_s=0.0))
        scheduler.state.check()
    assert {handle for handle, ending in outcome.endings.items() if ending.error} == {2}
    assert set(outcome.endings) == {0, 1, 2}
