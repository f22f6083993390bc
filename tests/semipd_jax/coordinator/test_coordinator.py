"""The coordinator, told by a client and answered by workers of plain Python."""

import dataclasses
import random

import pytest
from coordinator_rig import LIMITS, Engine, expected

from semipd_jax.coordinator.__main__ import take_in
from semipd_jax.coordinator.coordinator import DEPTH
from semipd_jax.messages import (
    Abort,
    Admitted,
    GetStats,
    PrefillStep,
    Refused,
    SetSlo,
    Slo,
    SloCounts,
    Stalled,
    Stats,
    WorkerLost,
    WorkerReady,
)
from semipd_jax.request import FinishReason
from semipd_jax.scheduler.decode import plan_decode
from semipd_jax.scheduler.prefill import plan_prefill
from semipd_jax.scheduler.state import MAX_CRASHES


@pytest.fixture
def engine() -> Engine:
    engine = Engine()
    engine.start_workers()
    return engine


def test_every_request_gets_its_tokens_and_one_ending(engine):
    requests = {h: engine.submit(h, max_tokens=3 + h) for h in range(4)}
    engine.run()
    tokens, done = engine.received()
    assert tokens == {h: expected(r) for h, r in requests.items()}
    assert {d.reason for d in done.values()} == {FinishReason.LENGTH}
    assert {h: d.completion_tokens for h, d in done.items()} == {h: 3 + h for h in requests}
    admitted = [m.handle for m in engine.clients.messages["c"] if isinstance(m, Admitted)]
    assert admitted == list(requests)


def test_next_decode_step_is_at_the_worker_before_the_last_is_answered(engine):
    engine.submit(1)
    engine.answer("prefill-1")
    assert len(engine.queue("decode-1")) == DEPTH


def test_steps_of_a_lost_worker_are_planned_again_for_its_replacement(engine):
    request = engine.submit(1)
    engine.answer("prefill-1")
    engine.device.run(engine.queue("decode-1")[0])  # it ran, the answer was lost
    engine.queue("decode-1").clear()
    engine.coordinator.worker_lost("decode", "decode-1")
    engine.scheduler.state.check()
    engine.coordinator.from_worker(WorkerReady("decode-2", "decode", 1.0))
    while engine.queue("decode-2"):
        engine.answer("decode-2")
    assert engine.received()[0][1] == expected(request)


def test_a_late_answer_of_a_lost_worker_counts_for_nothing(engine):
    request = engine.submit(1)
    engine.answer("prefill-1")
    late = engine.device.run(engine.queue("decode-1")[0], "decode-1")
    engine.coordinator.worker_lost("decode", "decode-1")
    engine.coordinator.from_worker(WorkerReady("decode-2", "decode", 1.0))
    engine.coordinator.from_worker(late)
    assert len(engine.received()[0][1]) == 1
    while engine.queue("decode-2"):
        engine.answer("decode-2")
    assert engine.received()[0][1] == expected(request)


def test_a_worker_that_is_lost_before_it_is_heard_gets_no_step(engine):
    """The launcher's word and the worker's come by different ways."""
    request = engine.submit(1)
    engine.answer("prefill-1")
    engine.coordinator.worker_lost("decode", "decode-1")
    engine.coordinator.worker_lost("decode", "decode-2")
    engine.coordinator.from_worker(WorkerReady("decode-2", "decode", 1.0))
    assert not engine.queue("decode-2")
    engine.coordinator.from_worker(WorkerReady("decode-3", "decode", 1.0))
    while engine.queue("decode-3"):
        engine.answer("decode-3")
    assert engine.received()[0][1] == expected(request)


def test_a_worker_that_left_for_the_fault_of_another_costs_nobody_a_crash(engine):
    request = engine.submit(1)
    engine.answer("prefill-1")
    for generation in range(1, MAX_CRASHES + 1):
        engine.coordinator.worker_lost("decode", f"decode-{generation}", is_to_blame=False)
        engine.coordinator.from_worker(WorkerReady(f"decode-{generation + 1}", "decode", 1.0))
    while engine.queue(f"decode-{MAX_CRASHES + 1}"):
        engine.answer(f"decode-{MAX_CRASHES + 1}")
    assert engine.received()[0][1] == expected(request)


def test_what_a_worker_replied_counts_before_its_loss_does(engine):
    """Else the crash is one of a step that had succeeded."""
    engine.submit(1, prompt_len=LIMITS.max_num_batched_tokens)
    engine.submit(2)
    succeeded, _ = engine.queue("prefill-1")
    waiting = [("prefill-1", engine.device.run(succeeded, "prefill-1"))]
    lost = [WorkerLost(worker_id="prefill-1", lane="prefill")]
    take_in(lost, waiting, engine.coordinator)
    crashes = {h: r.num_crashes for (_, h), r in engine.scheduler.state.requests.items()}
    assert crashes == {1: 0, 2: 1}
    assert len(engine.received()[0][1]) == 1


def test_abort_ends_the_stream_at_once_and_frees_pages_after_the_step(engine):
    engine.submit(1)
    engine.answer("prefill-1")
    engine.coordinator.from_client("c", Abort(1, FinishReason.STOP))
    tokens, done = engine.received()
    assert done[1].reason is FinishReason.STOP
    assert engine.scheduler.state.num_quarantined_pages > 0
    engine.run()
    assert engine.received()[0] == tokens
    assert engine.scheduler.state.pages.num_available == LIMITS.num_pages - 1


def test_a_request_that_the_engine_gives_up_on_has_missed_its_promise(engine):
    for handle, error in ((1, None), (2, "it took too long")):
        engine.submit(handle)
        engine.coordinator.from_client("c", Abort(handle, error=error))
    assert {h: d.error for h, d in engine.received()[1].items()} == {1: None, 2: "it took too long"}
    counts = engine.coordinator._counts.attainment.counts()
    assert (counts.num_ended, counts.num_met) == (1, 0)


def test_requests_wait_for_workers_then_run():
    engine = Engine()
    request = engine.submit(1)
    assert not engine.workers.messages
    engine.start_workers()
    engine.run()
    assert engine.received()[0][1] == expected(request)


def test_full_queue_is_refused_and_says_the_limit():
    engine = Engine()
    for handle in range(5):
        engine.submit(handle)
    refused = [m for m in engine.clients.messages["c"] if isinstance(m, Refused)]
    assert [r.handle for r in refused] == [4]
    assert "4 requests" in refused[0].message


def test_each_client_hears_only_of_its_own(engine):
    engine.submit(1, client="a")
    engine.submit(1, client="b", prompt_len=9)
    engine.run()
    assert engine.received("a")[0][1] != engine.received("b")[0][1]
    assert list(engine.received("a")[1]) == list(engine.received("b")[1]) == [1]


def test_a_client_that_cannot_be_reached_loses_its_requests(engine):
    engine.submit(1, client="gone")
    other = engine.submit(2, client="c")
    engine.clients.unreachable.add("gone")
    engine.run()
    assert not engine.scheduler.state.requests
    assert engine.received("c")[0][2] == expected(other)


@pytest.mark.parametrize(("waited_s", "num_missed"), [(0.5, 0), (5.0, 2)])
def test_a_client_that_vanished_after_a_promise_was_broken_counts(engine, waited_s, num_missed):
    """Each of its requests, those in the queue too."""
    engine.coordinator.from_client("c", SetSlo(7, Slo(ttft_ms=1000.0)))
    engine.submit(1, client="gone")
    engine.submit(2, client="gone")
    engine.now += waited_s
    engine.clients.unreachable.add("gone")
    engine.run()
    counts = engine.coordinator._counts.attainment.counts()
    assert (counts.num_ended, counts.num_met) == (num_missed, 0)


def test_a_worker_that_holds_a_step_too_long_is_reported_once_per_timeout(engine):
    engine.submit(1)
    engine.now = 9.0
    engine.coordinator.watch()
    assert engine.asked == []
    engine.now = 10.5
    engine.coordinator.watch()
    engine.coordinator.watch()
    assert engine.asked == [Stalled(worker_id="prefill-1")]


def test_stats_count_what_happened(engine):
    engine.submit(1, max_tokens=4)
    engine.run()
    engine.coordinator.from_client("c", GetStats(7))
    stats = engine.clients.messages["c"][-1]
    assert isinstance(stats, Stats)
    assert (stats.query_id, stats.num_prefill_steps, stats.num_decode_steps) == (7, 1, 3)
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_pages == stats.num_pages == LIMITS.num_pages - 1


def test_requests_that_find_no_room_miss_what_was_promised():
    engine = Engine()
    for handle in range(LIMITS.max_num_queued_reqs + 2):
        engine.submit(handle)
    engine.coordinator.from_client("c", GetStats(7))
    *refused, stats = engine.clients.messages["c"]
    assert [type(message) for message in refused] == [Refused, Refused]
    assert stats.num_waiting == LIMITS.max_num_queued_reqs
    assert stats.slo == SloCounts(2, 0, 0, 0)
    assert (stats.recent.num_ended, stats.recent.num_met) == (2, 0)


def test_cached_tokens_are_announced_and_counted(engine):
    engine.submit(1, prompt_len=6, max_tokens=4)
    engine.run()
    engine.submit(1, prompt_len=11, max_tokens=1)  # begins with the same 6 tokens
    engine.run()
    engine.coordinator.from_client("c", GetStats(7))
    *messages, stats = engine.clients.messages["c"]
    assert [m.cached_tokens for m in messages if isinstance(m, Admitted)] == [0, 4]
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (17, 4)
    assert stats.num_cached_pages == 3  # of 9 tokens with KV, then one more of 11
    assert stats.num_free_pages == stats.num_pages


def test_long_prompts_do_not_hold_up_the_decode_of_others(engine):
    engine.submit(1, prompt_len=4, max_tokens=20)
    engine.answer("prefill-1")
    engine.submit(2, prompt_len=30, max_tokens=2)
    assert isinstance(engine.queue("prefill-1")[0], PrefillStep)
    before = len(engine.received()[0][1])
    for _ in range(5):
        engine.answer("decode-1")
    assert len(engine.received()[0][1]) == before + 5


PLANS = {
    "semi-pd": {"prefill-1": [plan_prefill], "decode-1": [plan_decode]},
    "colocated": {"colocated-1": [plan_prefill, plan_decode]},
    "chunked": {"chunked-1": [plan_prefill, plan_decode]},
}
"""Mode → worker → what it may be sent."""


@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize("num_pages", [9, 12])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_could_be_sent_is_held_back(mode, num_pages, seed):
    """Else there may be nothing under way, and no reply to wait for, with requests that want one.
    Pages, aborts and a client that vanishes are what holds requests up and lets them go on."""
    rng = random.Random(seed)
    engine = Engine(
        limits=dataclasses.replace(
            LIMITS, num_pages=num_pages, max_num_batched_tokens=8, max_num_queued_reqs=99
        ),
        mode=mode,
    )
    engine.start_workers()
    workers = PLANS[mode]
    for handle in range(40):
        prompt_len = rng.randint(1, 24)
        client = rng.choice(["c", "vanishing"])
        engine.submit(
            handle, prompt_len=prompt_len, max_tokens=rng.randint(1, 31 - prompt_len), client=client
        )
        for _ in range(rng.randint(0, 6)):
            busy = [worker for worker in workers if engine.queue(worker)]
            if busy:
                engine.answer(rng.choice(busy))
            for worker, plans in workers.items():
                can_be_sent = any(plan(engine.scheduler.state) for plan in plans)
                assert len(engine.queue(worker)) == DEPTH or not can_be_sent
        if rng.random() < 0.2:
            engine.coordinator.from_client(
                "c", Abort(rng.randrange(handle + 1), FinishReason.ABORT)
            )
        engine.clients.unreachable = {"vanishing"} if handle == 20 else set()
    engine.run()
    assert not engine.scheduler.state.requests
