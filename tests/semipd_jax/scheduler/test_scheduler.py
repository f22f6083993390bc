"""The scheduler against a device that executes late, out of step with it, and dies."""

import itertools
from collections import deque

import msgspec
import numpy as np
import pytest
from fake_device import FakeDevice, next_token
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from semipd_jax.messages import ROW_SAMPLING, PrefillStep, StepLogprobs
from semipd_jax.request import MAX_LOGPROBS, FinishReason, Request, SamplingParams
from semipd_jax.scheduler.scheduler import Result, Scheduler
from semipd_jax.scheduler.state import MAX_CRASHES, Limits

PAGE_SIZE, MAX_LEN = 4, 24


def make_scheduler(*, num_pages: int = 20, num_rows: int = 5, budget: int = 16, queue: int = 100):
    limits = Limits(
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        num_rows=num_rows,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=budget,
        max_num_queued_reqs=queue,
    )
    device = FakeDevice(
        num_pages=num_pages, page_size=PAGE_SIZE, num_rows=num_rows, length=MAX_LEN + 1
    )
    return Scheduler(limits), device


def make_request(prompt_len: int, max_tokens: int, *, seed: int = 0, stop=()) -> Request:
    return Request(
        request_id=f"{prompt_len}-{max_tokens}-{seed}",
        prompt_token_ids=tuple((i * 13 + seed) % 50 for i in range(prompt_len)),
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=tuple(stop)),
    )


def expected(request: Request) -> tuple[list[int], FinishReason]:
    tokens, sampling = list(request.prompt_token_ids), request.sampling
    output: list[int] = []
    while len(output) < (sampling.max_tokens or 0):
        output.append(next_token([*tokens, *output], sampling.seed or 0))
        if output[-1] in sampling.stop_token_ids:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


class Outcome:
    """Collects what each handle got."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.endings: dict[int, object] = {}

    def take(self, result: Result) -> None:
        for token in result.tokens:
            assert token.request.handle not in self.endings, "a token after the end"
            self.tokens.setdefault(token.request.handle, []).append(token.token_id)
        for ending in result.endings:
            assert ending.request.handle not in self.endings, "ended twice"
            self.endings[ending.request.handle] = ending


def run_to_end(scheduler: Scheduler, device: FakeDevice, outcome: Outcome, *, most: int = 5000):
    """Sends, runs and answers one step at a time until nothing is left."""
    for _ in range(most):
        sent = scheduler.next_prefill(now_s=0.0) or scheduler.next_decode()
        if sent is None:
            break
        outcome.take(scheduler.step_done(device.run(sent.step), now_s=0.0))
        scheduler.state.check()
    assert not scheduler.state.requests, "requests are stuck"
    assert not scheduler.state.in_flight


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


def test_full_queue_refuses():
    scheduler, _ = make_scheduler(queue=2)
    refusals = [scheduler.submit("c", i, make_request(4, 8), now_s=0.0) for i in range(3)]
    assert refusals[:2] == [None, None]
    assert "2 requests are waiting" in refusals[2]


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


class Serving(RuleBasedStateMachine):
    """Requests come, go and are aborted while two devices run steps late, and die and run again."""

    @initialize(num_pages=st.integers(7, 24), num_rows=st.integers(2, 6), budget=st.integers(1, 24))
    def start(self, num_pages, num_rows, budget):
        self.scheduler, self.device = make_scheduler(
            num_pages=num_pages, num_rows=num_rows, budget=max(budget, 1)
        )
        self.queues = {"prefill": deque(), "decode": deque()}
        self.requests: dict[int, Request] = {}
        self.handles = itertools.count()
        self.outcome = Outcome()

    @rule(prompt_len=st.integers(1, 18), max_tokens=st.integers(1, 12), seed=st.integers(0, 2**40))
    def submit(self, prompt_len, max_tokens, seed):
        max_tokens = min(max_tokens, MAX_LEN - prompt_len)
        request = make_request(prompt_len, max_tokens, seed=seed % 2**32, stop=[seed % 50])
        handle = next(self.handles)
        assert self.scheduler.submit("c", handle, request, now_s=0.0) is None
        self.requests[handle] = request

    @rule()
    def send_prefill(self):
        if len(self.queues["prefill"]) < 2 and (sent := self.scheduler.next_prefill(now_s=0.0)):
            self.queues["prefill"].append(sent.step)

    @rule()
    def send_decode(self):
        if len(self.queues["decode"]) < 2 and (sent := self.scheduler.next_decode()):
            self.queues["decode"].append(sent.step)

    @rule(phase=st.sampled_from(["prefill", "decode"]))
    def answer(self, phase):
        if self.queues[phase]:
            reply = self.device.run(self.queues[phase].popleft())
            self.outcome.take(self.scheduler.step_done(reply, now_s=0.0))

    @rule(phase=st.sampled_from(["prefill", "decode"]), ran=st.integers(0, 2))
    def lose_worker(self, phase, ran):
        """Some of its steps had run, unanswered; all of them are planned again."""
        for step in list(self.queues[phase])[:ran]:
            self.device.run(step)
        steps = [step.step_id for step in self.queues[phase]]
        self.queues[phase].clear()
        self.outcome.take(self.scheduler.worker_lost(steps, now_s=0.0))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        handle = data.draw(st.sampled_from(sorted(self.requests)))
        self.outcome.take(self.scheduler.abort("c", handle, FinishReason.ABORT, now_s=0.0))

    @invariant()
    def holds(self):
        if hasattr(self, "scheduler"):
            self.scheduler.state.check()

    @invariant()
    def nothing_that_a_step_in_flight_names_is_free(self):
        if not hasattr(self, "scheduler"):
            return
        state = self.scheduler.state
        for step in itertools.chain(*self.queues.values()):
            pages = set(np.frombuffer(step.page_table, np.int32).tolist()) - {0}
            assert not pages & set(state.pages._free._free)
            assert not set(np.frombuffer(step.rows, np.int32).tolist()) & set(state.free_rows)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for phase in self.queues:
            while self.queues[phase]:
                self.answer(phase)
        run_to_end(self.scheduler, self.device, self.outcome)
        assert set(self.outcome.endings) == set(self.requests), "a request got no answer"
        for handle, request in self.requests.items():
            tokens, reason = expected(request)
            got, ending = self.outcome.tokens.get(handle, []), self.outcome.endings[handle]
            if ending.reason is FinishReason.ABORT:
                assert got == tokens[: len(got)]
            else:
                assert (got, ending.reason) == (tokens, reason)
        assert self.scheduler.state.pages.num_available == self.scheduler.state.limits.num_pages - 1


Serving.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestServing = Serving.TestCase
