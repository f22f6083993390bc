"""The coordinator with one worker for both phases."""

import random

import pytest
from coordinator_rig import LIMITS, Engine, expected

from semipd_jax.coordinator.coordinator import DEPTH
from semipd_jax.messages import GetStats, MixedStep, PartitionReply, SetPartition, WorkerReady


@pytest.fixture(params=["colocated", "chunked"])
def mode(request) -> str:
    return request.param


@pytest.fixture
def engine(mode) -> Engine:
    engine = Engine(mode=mode)
    engine.start_workers()
    return engine


def test_every_request_gets_its_tokens(engine):
    requests = {h: engine.submit(h, prompt_len=20, max_tokens=3 + h) for h in range(4)}
    engine.run()
    tokens, done = engine.received()
    assert tokens == {h: expected(r) for h, r in requests.items()}
    assert set(done) == set(requests)
    assert engine.scheduler.state.pages.num_available == LIMITS.num_pages - 1


def test_the_next_step_is_at_the_worker_before_the_last_is_answered(engine, mode):
    worker = f"{mode}-1"
    engine.submit(1, max_tokens=20)
    engine.answer(worker)
    engine.submit(2, prompt_len=30, max_tokens=2)
    for _ in range(6):
        assert len(engine.queue(worker)) == DEPTH
        engine.answer(worker)


def test_tokens_of_running_requests_do_not_wait_for_a_long_prompt_if_steps_are_mixed(engine, mode):
    worker = f"{mode}-1"
    engine.submit(1, prompt_len=4, max_tokens=20)
    for _ in range(3):
        engine.answer(worker)
    engine.submit(2, prompt_len=30, max_tokens=2)
    while not isinstance(engine.queue(worker)[-1], MixedStep) and mode == "chunked":
        engine.answer(worker)
    for _ in range(DEPTH):  # planned before the prompt came
        engine.answer(worker)
    before = len(engine.received()[0][1])
    engine.answer(worker)
    assert len(engine.received()[0][1]) == before + (mode == "chunked")


def test_steps_of_a_lost_worker_are_planned_again(engine, mode):
    rng = random.Random(0)
    requests = {h: engine.submit(h, prompt_len=9 + h, max_tokens=8) for h in range(4)}
    for generation in range(1, 40):
        queue = engine.queue(f"{mode}-{generation}")
        for _ in range(rng.randint(1, 3)):
            if queue:
                engine.answer(f"{mode}-{generation}")
        for step in list(queue)[: rng.randint(0, 2)]:
            engine.device.run(step)  # it ran, the answer was lost
        queue.clear()
        engine.coordinator.worker_lost(mode, f"{mode}-{generation}")
        engine.scheduler.state.check()
        ready = WorkerReady(f"{mode}-{generation + 1}", mode, 1.0)
        engine.coordinator.from_worker(ready)
    engine.run(generation=40)
    assert engine.received()[0] == {h: expected(r) for h, r in requests.items()}


def test_shares_cannot_be_set_but_are_reported(engine):
    engine.submit(1)
    changes = [SetPartition(7, decode=0.5), SetPartition(8, policy="predictive"), SetPartition(9)]
    for change in changes:
        engine.coordinator.from_client("c", change)
    shares, policy, report = list(engine.clients.messages["c"])[-3:]
    assert isinstance(report, PartitionReply)
    assert shares.error == "a mode with one worker for both phases has no shares"
    assert policy.error == "policy is 'predictive'; allowed: static"
    assert (report.error, report.partition) == (None, shares.partition)
    assert report.partition.prefill == report.partition.decode
    assert (report.partition.decode.current, report.partition.decode.warm) == (1.0, (1.0,))


def test_mixed_steps_count_for_both_phases(engine, mode):
    engine.submit(1, prompt_len=4, max_tokens=20)
    engine.submit(2, prompt_len=30, max_tokens=2)
    engine.run()
    engine.coordinator.from_client("c", GetStats(7))
    stats = engine.clients.messages["c"][-1]
    num_steps = stats.num_prefill_steps + stats.num_decode_steps
    assert stats.num_prefill_steps == 3  # 34 prompt tokens, at most 16 a step
    assert stats.num_decode_steps >= 19
    assert (num_steps > engine.num_answers) == (mode == "chunked")
