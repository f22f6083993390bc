"""Shares that change while requests run: the coordinator, and workers of plain Python."""

import random

import pytest
from coordinator_rig import Engine, expected

from semipd_jax.config import ShareConfig
from semipd_jax.messages import (
    Partition,
    PartitionReply,
    RetireWorker,
    SetPartition,
    StartWorker,
    WorkerReady,
)

LADDER = ShareConfig(prefill=0.5, decode=0.5, ladder=(1.0,))


@pytest.fixture
def engine() -> Engine:
    engine = Engine(LADDER)
    for phase in ("prefill", "decode"):
        for share in (0.5, 1.0):
            engine.coordinator.from_worker(WorkerReady(f"{phase}-{share}", phase, share))
    return engine


def ask(engine: Engine, **shares: float) -> Partition:
    engine.coordinator.from_client("control", SetPartition(1, **shares))
    report = engine.clients.messages["control"][-1]
    assert isinstance(report, PartitionReply)
    return report.partition


def busy(engine: Engine) -> list[str]:
    return [name for name, queue in engine.workers.messages.items() if queue]


def run(engine: Engine, on_step=lambda: None) -> None:
    while names := busy(engine):
        engine.answer(names[0])
        on_step()
        engine.scheduler.state.check()


def test_a_phase_alone_runs_at_its_largest_share(engine):
    engine.submit(1, max_tokens=20)
    assert busy(engine) == ["prefill-1.0"]
    engine.answer("prefill-1.0")
    assert busy(engine) == ["decode-1.0"]
    engine.submit(2, prompt_len=30, max_tokens=2)
    assert "prefill-0.5" in busy(engine)
    engine.answer("decode-1.0")
    engine.answer("decode-1.0")
    assert sorted(busy(engine)) == ["decode-0.5", "prefill-0.5"]


def test_shares_that_change_all_the_time_change_no_token(engine):
    rng = random.Random(1)
    requests = {}

    def change() -> None:
        if len(requests) < 40 and not engine.scheduler.state.waiting:
            handle = len(requests)
            requests[handle] = engine.submit(handle, prompt_len=4 + handle % 20, max_tokens=8)
        ask(engine, prefill=rng.choice([0.5, 1.0]), decode=rng.choice([0.5, 1.0]))
        one_worker_per_phase(engine)

    change()
    run(engine, change)
    assert engine.received()[0] == {h: expected(r) for h, r in requests.items()}
    report = ask(engine)
    assert min(report.prefill.num_switches, report.decode.num_switches) > 5


def one_worker_per_phase(engine: Engine) -> None:
    phases = [name.split("-")[0] for name in busy(engine)]
    assert len(phases) == len(set(phases)), "two workers of a phase hold steps"


def test_a_share_beside_the_ladder_is_started_used_and_let_go(engine):
    request = engine.submit(1, max_tokens=20)
    engine.answer("prefill-1.0")
    engine.submit(2, prompt_len=30, max_tokens=2)
    assert ask(engine, decode=0.7).decode.warm == (0.5, 1.0)
    assert engine.asked == [StartWorker(lane="decode", share=0.7)]
    engine.coordinator.from_worker(WorkerReady("decode-0.7", "decode", 0.7))
    for name in list(busy(engine)):
        if name.startswith("decode"):
            while engine.queue(name):
                engine.answer(name)
    assert "decode-0.7" in busy(engine)
    assert ask(engine, decode=0.5).decode.current == 0.7
    assert engine.asked[1:] == [], "it still holds steps"
    while engine.queue("decode-0.7"):
        engine.answer("decode-0.7")
    assert engine.asked[1:] == [RetireWorker(worker_id="decode-0.7")]
    run(engine)
    assert engine.received()[0][1] == expected(request)


def test_a_worker_that_comes_when_it_is_no_longer_wanted_is_let_go(engine):
    ask(engine, prefill=0.8)
    ask(engine, prefill=1.0)
    engine.coordinator.from_worker(WorkerReady("prefill-0.8", "prefill", 0.8))
    assert engine.asked[1:] == [RetireWorker(worker_id="prefill-0.8")]
    assert ask(engine).prefill.warm == (0.5, 1.0)


def test_a_share_that_cannot_be_had_leaves_the_phase_where_it_is(engine):
    request = engine.submit(1, max_tokens=20)
    engine.answer("prefill-1.0")
    ask(engine, decode=0.7)
    engine.coordinator.share_unavailable("decode", 0.7)
    assert ask(engine).decode.asked == 1.0
    engine.coordinator.share_unavailable("decode", 0.2)
    assert ask(engine).decode.asked == 1.0, "an answer to a wish of the past"
    run(engine)
    assert engine.received()[0][1] == expected(request)


def test_the_loss_of_the_active_worker_moves_its_steps_to_another_rung(engine):
    request = engine.submit(1, max_tokens=20)
    engine.answer("prefill-1.0")
    engine.queue("decode-1.0").clear()
    engine.coordinator.worker_lost("decode", "decode-1.0")
    assert busy(engine) == ["decode-0.5"]
    run(engine)
    assert engine.received()[0][1] == expected(request)


def test_the_loss_of_an_idle_rung_changes_nothing(engine):
    request = engine.submit(1, max_tokens=20)
    engine.answer("prefill-1.0")
    engine.coordinator.worker_lost("decode", "decode-0.5")
    assert busy(engine) == ["decode-1.0"]
    run(engine)
    assert engine.received()[0][1] == expected(request)
    assert ask(engine).decode.warm == (1.0,)
