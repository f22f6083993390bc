"""The tuner in the coordinator: what it is told, what it decides, what clients may change."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from coordinator_rig import Engine, expected
from modelled_profile import TRUTH
from scheduler_cases import make_request, make_scheduler

from semipd_jax.config import ShareConfig, SharePolicy
from semipd_jax.coordinator.coordinator import Coordinator
from semipd_jax.coordinator.tuned import TunedShares, kv_demand, upcoming_prefill
from semipd_jax.errors import ConfigError
from semipd_jax.messages import (
    DecodeStep,
    GetStats,
    Partition,
    PartitionReply,
    PrefillStep,
    SetPartition,
    SetSlo,
    Slo,
    Stats,
    StepDone,
    Submit,
    WorkerReady,
)
from semipd_jax.request import FinishReason, Request, SamplingParams
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Limits
from semipd_jax.tuner.latency import LatencyModel, Sample
from semipd_jax.tuner.policies import make_tuner
from semipd_jax.tuner.policy import Decision, Ladders, Observation, Shares
from semipd_jax.tuner.refined import RefinedModel
from semipd_jax.tuner.slo import SloTarget, SloTargets
from semipd_jax.tuner.tuner import Tuner

LADDER = (0.5, 1.0)


@dataclass
class Recorder(Tuner):
    """Keeps what it is told; decides as `rule` says."""

    rule: Callable[[Observation], Shares] = lambda _: Shares(1.0, 1.0)
    seen: list[Observation] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self)

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        inputs = (("kv_used", observation.kv_used),)
        return Decision(self.rule(observation), "a rule", 0.02, 0.03, inputs)

    def step_done(self, sample: Sample) -> None:
        self.samples.append(sample)


class TunedEngine(Engine):
    """With two rungs per phase; the clock moves only when a test moves it."""

    def __init__(self, tuner_of, policy: SharePolicy = "predictive", slo=(300.0, 50.0)) -> None:
        super().__init__(ShareConfig(ladder=LADDER))
        self.shares = TunedShares(
            ShareConfig(ladder=LADDER),
            tuner_of,
            self.scheduler,
            lambda: self.now,
            policy=policy,
            targets=SloTargets(SloTarget(*slo)),
        )
        self.coordinator = Coordinator(
            self.scheduler,
            self.workers,
            self.clients,
            self.shares,
            step_timeout_s=10.0,
            tell_launcher=self.asked.append,
            clock=lambda: self.now,
        )
        for phase in ("prefill", "decode"):
            for share in LADDER:
                self.coordinator.from_worker(WorkerReady(f"{phase}-{share}", phase, share))

    def busy(self, phase: str) -> str:
        [name] = [n for n, queue in self.workers.messages.items() if queue and phase in n]
        return name

    def finish(self, phase: str, device_s: float) -> StepDone:
        worker = self.busy(phase)
        reply = self.device.run(self.queue(worker).popleft(), worker)
        reply = msgspec.structs.replace(reply, device_s=device_s)
        self.coordinator.from_worker(reply)
        return reply

    def run_all(self, step_s: float = 0.01) -> None:
        while busy := [n for n, queue in self.workers.messages.items() if queue]:
            self.now += step_s
            self.answer(busy[0])
            self.scheduler.state.check()

    def change(self, message: SetPartition | SetSlo) -> tuple[Partition, str | None]:
        self.coordinator.from_client("control", message)
        reply = self.clients.messages["control"][-1]
        assert isinstance(reply, PartitionReply)
        return reply.partition, reply.error

    def stats(self) -> Stats:
        self.coordinator.from_client("control", GetStats(1))
        stats = self.clients.messages["control"][-1]
        assert isinstance(stats, Stats)
        return stats


@pytest.fixture
def tuner() -> Recorder:
    return Recorder()


@pytest.fixture
def engine(tuner: Recorder) -> TunedEngine:
    return TunedEngine(lambda policy, *_: None if policy == "static" else tuner)


# ------------------------------------------------------------ what it is told


def test_samples_are_the_steps_with_their_times_and_neighbours(engine, tuner):
    tuner.rule = lambda o: Shares(1.0, 0.5) if o.prefill and o.decode else Shares(1.0, 1.0)
    engine.submit(1, prompt_len=6, max_tokens=20)
    engine.now = 2.0
    engine.finish("prefill", 1.9)  # alone
    [sample] = tuner.samples
    assert (sample.work.phase, sample.work.num_tokens, sample.work.num_pairs) == ("prefill", 6, 21)
    assert (sample.seconds, sample.conditions.overlap, sample.conditions.share) == (1.9, 0.0, 1.0)

    engine.now = 3.0
    engine.submit(2, prompt_len=10, max_tokens=2)  # its prefill begins here
    engine.now = 4.0
    engine.finish("decode", 1.0)  # from 2 to 4, beside prefill from 3 on
    engine.now = 5.0
    engine.finish("prefill", 2.0)  # from 3 to 5, beside decode
    decode, prefill = tuner.samples[1:]
    assert (decode.work.num_rows, decode.work.context_tokens) == (1, 7)
    assert (decode.conditions.overlap, decode.conditions.other_share) == (0.5, 1.0)
    assert (prefill.work.num_tokens, prefill.conditions.overlap) == (10, 1.0)
    assert prefill.conditions.other_share == 1.0


def test_steps_of_a_lost_worker_are_no_samples(engine, tuner):
    request = engine.submit(1, max_tokens=20)
    engine.finish("prefill", 1.0)
    lost = engine.busy("decode")
    engine.queue(lost).clear()
    engine.coordinator.worker_lost("decode", lost)
    before = len(tuner.samples)
    engine.run_all()
    steps = [s for s in tuner.samples[before:] if s.work.phase == "decode"]
    assert len(steps) == 0, "fake workers report no time"
    assert engine.received()[0][1] == expected(request)
    assert engine.stats().num_decode_restarts == 1


def test_finished_requests_reach_the_policy_once(engine, tuner):
    engine.submit(1, max_tokens=3)
    engine.run_all()
    engine.submit(2, max_tokens=3)
    engine.run_all()
    finished = [request for o in tuner.seen for request in o.finished]
    assert len(finished) == 1  # the second one has nobody after it
    assert finished[0].ttft_s == pytest.approx(0.01)
    assert finished[0].tpot_s == pytest.approx(0.01)


def test_priorities_are_told_where_promises_depend_on_them(engine, tuner):
    engine.change(SetSlo(1, Slo(None, 20.0, 7)))
    for handle, priority in ((1, 0), (2, 7)):
        sampling = SamplingParams(max_tokens=20, seed=1)
        request = Request(
            request_id=str(handle), prompt_token_ids=(1, 2), sampling=sampling, priority=priority
        )
        engine.coordinator.from_client("c", Submit(handle, request))
    engine.run_all()
    assert {o.priorities for o in tuner.seen} >= {frozenset({0}), frozenset({0, 7})}
    assert engine.shares.targets.by_class == {7: SloTarget(None, 20.0)}


# ------------------------------------------------------------ what it decides


def test_decisions_choose_the_worker_and_are_told(engine, tuner, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("semipd_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "semipd_jax.coordinator.tuned")
    tuner.rule = lambda o: Shares(1.0, 0.5 if o.prefill else 1.0)
    engine.submit(1, max_tokens=20)
    engine.finish("prefill", 1.0)
    assert engine.busy("decode") == "decode-1.0"
    engine.submit(2, prompt_len=30, max_tokens=2)
    engine.finish("decode", 1.0)
    engine.finish("decode", 1.0)
    assert engine.busy("decode") == "decode-0.5"
    choice = engine.stats().partition.choice
    assert (choice.phase, choice.decode, choice.reason) == ("decode", 0.5, "a rule")
    assert (choice.predicted_prefill_s, choice.predicted_decode_s) == (0.02, 0.03)
    [record] = caplog.records
    told = msgspec.json.decode(record.getMessage().partition(": ")[2])
    assert (told["phase"], told["from"], told["to"]) == ("decode", 1.0, 0.5)
    assert told["reason"] == "a rule"
    assert told["predicted_decode_s"] == 0.03
    assert set(told["inputs"]) == {"kv_used"}


@pytest.fixture
def told(engine, tuner, caplog, monkeypatch):
    """What is logged at a level while decode's share changes with every prompt."""
    monkeypatch.setattr(logging.getLogger("semipd_jax"), "propagate", True)

    def run(level: int, step_s: float) -> list[dict[str, Any]]:
        caplog.set_level(level, "semipd_jax.coordinator.tuned")
        engine.submit(0, prompt_len=4, max_tokens=28)
        engine.finish("prefill", 1.0)
        for handle in range(1, 14):
            decode = 0.5 + 0.5 * (handle % 2)
            tuner.rule = lambda _, decode=decode: Shares(1.0, decode)
            engine.now += step_s
            engine.submit(handle, prompt_len=4, max_tokens=1)
            for _ in range(2):  # both in flight, beside the prompt
                engine.finish("decode", 1.0)
            engine.finish("prefill", 1.0)
        return [msgspec.json.decode(r.getMessage().partition(": ")[2]) for r in caplog.records]

    return run


def test_changes_are_logged_once_a_second_at_most(engine, told):
    records = told(logging.INFO, step_s=0.3)
    assert 2 <= len(records) <= engine.now + 1
    assert sum(r["not_at_info"] for r in records) > 3


def test_every_change_is_logged_at_the_level_debug(told):
    records = [r for r in told(logging.DEBUG, step_s=0.01) if r["phase"] == "decode"]
    moves = [r["to"] for r in records if r["to"] != r["from"]]
    assert len(moves) >= 10
    assert all(a != b for a, b in pairwise([1.0, *moves])), "a change is missing"


def test_every_step_is_logged_at_the_level_debug_with_what_it_ran_at(
    engine, tuner, caplog, monkeypatch
):
    """A policy wants half of the device; the idle rule gives it all of it."""
    monkeypatch.setattr(logging.getLogger("semipd_jax"), "propagate", True)
    caplog.set_level(logging.DEBUG, "semipd_jax.coordinator.tuned")
    tuner.rule = lambda _: Shares(0.5, 0.5)
    engine.submit(1, prompt_len=4, max_tokens=20)
    engine.run_all()
    records = [msgspec.json.decode(r.getMessage().partition(": ")[2]) for r in caplog.records]
    stats = engine.stats()
    assert len(records) == stats.num_prefill_steps + stats.num_decode_steps
    assert len({r["step_id"] for r in records}) == len(records)
    assert {(r["to"], r["shares"]["decode"], r["is_alone"]) for r in records} == {(1.0, 0.5, True)}
    assert {r.getMessage().partition(":")[0] for r in caplog.records} == {"share stays"}


def test_a_policy_is_told_what_the_other_phase_runs_at_not_what_it_should(engine, tuner):
    """Prefill is to change, but its worker still has a step that was sent before."""
    tuner.rule = lambda o: Shares(0.5 if o.decode else 1.0, 1.0)
    engine.submit(1, max_tokens=20)
    engine.finish("prefill", 1.0)
    engine.submit(2, prompt_len=30, max_tokens=2)
    engine.submit(3, prompt_len=30, max_tokens=2)
    tuner.rule = lambda _: Shares(1.0, 1.0)
    engine.finish("prefill", 1.0)
    assert engine.shares.asked["prefill"] == 1.0
    assert engine.busy("prefill") == "prefill-0.5"
    tuner.seen.clear()
    engine.finish("decode", 1.0)
    engine.finish("decode", 1.0)
    assert engine.busy("prefill") == "prefill-0.5"
    assert {o.shares.prefill for o in tuner.seen if o.phase == "decode"} == {0.5}


@pytest.mark.parametrize("policy", ["semi-pd", "predictive"])
def test_a_phase_alone_takes_the_top_rung_whatever_the_policy_says(policy, tuner):
    engine = TunedEngine(lambda policy, *_: tuner, policy)
    tuner.rule = lambda _: Shares(0.5, 0.5)
    engine.submit(1, max_tokens=20)
    assert engine.busy("prefill") == "prefill-1.0"
    engine.finish("prefill", 1.0)
    assert engine.busy("decode") == "decode-1.0"
    engine.submit(2, prompt_len=30, max_tokens=2)
    assert engine.busy("prefill") == "prefill-0.5"
    while len(engine.queue("decode-1.0")) > 0:
        engine.finish("decode", 1.0)
    assert engine.busy("decode") == "decode-0.5"


def test_tokens_are_the_same_whatever_is_decided(engine, tuner):
    rng = np.random.default_rng(0)
    tuner.rule = lambda _: Shares(*map(float, rng.choice(LADDER, 2)))
    requests = {h: engine.submit(h, prompt_len=4 + 5 * h, max_tokens=8) for h in range(4)}
    engine.run_all()
    assert engine.received()[0] == {h: expected(r) for h, r in requests.items()}


# ------------------------------------------------------------ what clients may change


def test_a_share_makes_the_policy_static_until_one_is_set_again(engine, tuner):
    partition, error = engine.change(SetPartition(1, decode=0.5))
    assert (partition.policy, partition.decode.asked, error) == ("static", 0.5, None)
    engine.submit(1, max_tokens=3)
    engine.run_all()
    assert tuner.seen == []
    partition, _ = engine.change(SetPartition(2, policy="predictive"))
    assert partition.policy == "predictive"
    engine.submit(2, max_tokens=3)
    engine.run_all()
    assert tuner.seen


def test_a_policy_begins_with_the_configured_shares_and_what_ran_under_them(engine, tuner):
    tuner.rule = lambda _: Shares(1.0, 0.5)
    engine.submit(1, max_tokens=3)
    engine.submit(2, max_tokens=6)
    engine.run_all()
    assert engine.shares.asked["decode"] == 0.5
    engine.submit(3, max_tokens=3)
    engine.now += 1.0
    began_s = engine.now
    partition, _ = engine.change(SetPartition(1, policy="semi-pd"))
    assert partition.decode.asked == 1.0
    tuner.seen.clear()
    engine.submit(4, max_tokens=3)
    engine.run_all()
    engine.submit(5, max_tokens=3)
    engine.run_all()
    finished = [request for o in tuner.seen for request in o.finished]
    assert [request.arrival_s for request in finished] == [began_s]


def test_the_other_share_is_the_configured_one_again(engine, tuner):
    tuner.rule = lambda _: Shares(1.0, 0.5)
    engine.submit(1, max_tokens=3)
    engine.run_all()
    assert engine.shares.asked["decode"] == 0.5
    partition, _ = engine.change(SetPartition(1, prefill=0.5))
    assert (partition.prefill.asked, partition.decode.asked) == (0.5, 1.0)
    partition, _ = engine.change(SetPartition(2, decode=0.5))
    assert (partition.prefill.asked, partition.decode.asked) == (0.5, 0.5), "static already"


def test_what_cannot_work_changes_nothing():
    def tuner_of(policy, targets, _):
        if targets.default.tpot_ms is None:
            raise ConfigError("slo_tpot_ms is None")
        return Recorder()

    engine = TunedEngine(tuner_of)
    partition, error = engine.change(SetSlo(1, Slo(ttft_ms=100.0)))
    assert error == "slo_tpot_ms is None"
    assert partition.slos == (Slo(300.0, 50.0),)
    assert partition.policy == "predictive"


def test_promises_are_replaced(engine):
    engine.change(SetSlo(1, Slo(None, 20.0, 7), 0.95))
    partition, error = engine.change(SetSlo(2, Slo(100.0, None)))
    assert error is None
    assert partition.slos == (Slo(100.0, None), Slo(None, 20.0, 7))
    assert partition.slo_target == 0.95
    for _ in range(2):  # there may be none
        partition, error = engine.change(SetSlo(3, Slo(priority=7), remove=True))
        assert error is None
        assert partition.slos == (Slo(100.0, None),)
    assert engine.shares.targets.of(7) == SloTarget(100.0, None)


# ------------------------------------------------------------ all of it


def test_the_predictive_policy_learns_and_its_error_is_known():
    model = RefinedModel(LatencyModel(TRUTH, 1 / 3, {"prefill": 0.0, "decode": 0.0}))
    engine = TunedEngine(
        lambda policy, targets, start: make_tuner(
            policy, ladders=Ladders(LADDER, LADDER), targets=targets, model=model, start=start
        )
    )
    engine.submit(1, prompt_len=4, max_tokens=25)
    engine.finish("prefill", 0.02)
    first = None
    for _ in range(24):
        engine.now += 0.02
        engine.finish("decode", 0.02)  # predicted: 6.5 ms
        stats = engine.stats()
        if first is None and stats.decode_error.count:
            first = stats.decode_error.total
    assert stats.decode_error.count == 24 // 4
    assert first == pytest.approx(0.02 / 6.5e-3 - 1, rel=0.1)
    mean_of_rest = (stats.decode_error.total - first) / (stats.decode_error.count - 1)
    assert mean_of_rest < first


def test_pages_that_requests_wait_for_count_as_used():
    """Nine pages of four tokens; a prompt of three of them, then one of eight."""
    scheduler = Scheduler(
        Limits(
            page_size=4,
            num_pages=10,
            num_rows=4,
            max_model_len=64,
            max_num_batched_tokens=64,
            max_num_queued_reqs=8,
        )
    )
    assert kv_demand(scheduler.state) == 0.0

    def submit(handle: int, num_tokens: int) -> None:
        prompt = tuple(range(num_tokens))
        request = Request(
            request_id="",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=2, temperature=0.0, seed=0),
        )
        assert scheduler.submit("client", handle, request, now_s=0.0) is None

    submit(0, 12)
    assert kv_demand(scheduler.state) == pytest.approx(3 / 9)
    assert scheduler.next_prefill(now_s=0.0) is not None
    assert kv_demand(scheduler.state) == pytest.approx(3 / 9), "held now"
    submit(1, 32)
    assert kv_demand(scheduler.state) == 1.0


def test_what_is_cached_is_neither_demand_nor_work():
    """Nine pages of four tokens; a prompt of four of them, and its next turn of three tokens."""
    scheduler, device = make_scheduler(num_pages=10)
    first = make_request(16, 8)
    scheduler.submit("c", 0, first, now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    scheduler.step_done(device.run(sent.step), now_s=0.0)
    assert kv_demand(scheduler.state) == pytest.approx(4 / 9)
    scheduler.submit("c", 1, make_request((*first.prompt_token_ids, 1, 2, 3), 2), now_s=0.0)
    assert kv_demand(scheduler.state) == pytest.approx(5 / 9)
    work = upcoming_prefill(scheduler.state)
    assert work is not None
    assert (work.num_rows, work.num_tokens, work.context_tokens) == (1, 3, 19)


def test_what_others_hold_is_demand_when_they_let_go_of_it():
    """Nineteen pages; a request waits whose first four another one holds, until that ends."""
    scheduler, device = make_scheduler(num_rows=2)
    first = make_request(16, 8)
    scheduler.submit("c", 0, first, now_s=0.0)
    sent = scheduler.next_prefill(now_s=0.0)
    assert sent is not None
    scheduler.step_done(device.run(sent.step), now_s=0.0)
    scheduler.submit("c", 1, make_request((*first.prompt_token_ids, 1, 2, 3), 2), now_s=0.0)
    assert kv_demand(scheduler.state) == pytest.approx((4 + 1) / 19)
    scheduler.abort("c", 0, FinishReason.ABORT, now_s=0.0)
    assert kv_demand(scheduler.state) == pytest.approx(5 / 19), "it will hold all five itself"


def test_a_preempted_request_is_demand_when_its_last_step_is_answered():
    scheduler, device = make_scheduler(num_pages=10)
    for handle in range(2):
        scheduler.submit("c", handle, make_request(12, 12, seed=handle), now_s=0.0)
    in_flight: list[PrefillStep | DecodeStep] = []
    while not scheduler.num_preemptions:
        sent = scheduler.next_prefill(now_s=0.0) or scheduler.next_decode()
        if sent is not None:
            in_flight.append(sent.step)
        if len(in_flight) == 2 or sent is None:
            scheduler.step_done(device.run(in_flight.pop(0)), now_s=0.0)
    [preempted] = scheduler.state.waiting
    for step in in_flight:
        scheduler.step_done(device.run(step), now_s=0.0)
    assert scheduler.state.num_quarantined_pages == 0
    assert scheduler.state.num_found(preempted) > 0, "its pages are cached"
    assert scheduler.state.num_found(preempted, held=True) == 0, "and nobody's"
    assert kv_demand(scheduler.state) == 1.0


def test_the_next_prefill_step_is_in_the_order_of_prefills():
    scheduler, _ = make_scheduler(policy="spf", budget=8)
    scheduler.submit("c", 0, make_request(20, 2), now_s=0.0)
    assert scheduler.next_prefill(now_s=0.0) is not None
    scheduler.submit("c", 1, make_request(5, 2, seed=1), now_s=0.0)
    work = upcoming_prefill(scheduler.state)
    assert work is not None
    assert (work.num_rows, work.num_tokens, work.context_tokens) == (2, 8, 5 + 11)
