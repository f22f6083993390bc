"""A profile measured on a device whose true step times are known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelled_profile import TRUTH

from semipd_jax.config import PHASES
from semipd_jax.coordinator.profiling import Bench
from semipd_jax.coordinator.trials import Trial, decode_shapes, prefill_shapes, step_of, trials
from semipd_jax.errors import EngineError
from semipd_jax.messages import MemoryLayout, StepDone, WorkerReady
from semipd_jax.options import build_config
from semipd_jax.profile import fitted
from semipd_jax.runtime.buckets import padded_sizes
from semipd_jax.simulator.device import Device
from semipd_jax.simulator.profiled import Profiled
from semipd_jax.tuner import profile
from semipd_jax.tuner.latency import CONTENTION, FEATURES, Conditions, LatencyModel
from semipd_jax.tuner.policy import Ladders
from semipd_jax.tuner.setup import ladders_of
from semipd_jax.tuner.work import Work, work_of

LADDER = (0.25, 0.5, 1.0)
BUDGET = 512
CONFIG = build_config("m", max_num_batched_tokens=BUDGET, max_num_seqs=64, share_ladder=LADDER)


def layout(*, max_model_len=2048, num_pages=2049, num_rows=65) -> MemoryLayout:
    return MemoryLayout(
        dtype="float32",
        vocab_size=500,
        max_model_len=max_model_len,
        page_size=16,
        num_pages=num_pages,
        num_rows=num_rows,
        weight_bytes=0,
        kv_bytes=0,
        eos_token_ids=(),
    )


class VirtualWorkers:
    """One worker for each phase and share, on a modelled device with a clock of its own."""

    def __init__(self, model: LatencyModel, noise: float = 0.0) -> None:
        self.now = 0.0
        self._machine = Profiled(model)
        self._device = Device(self._machine, num_lanes=2, hop_s=1e-5, noise=noise, seed=0)
        self._ready = [WorkerReady(f"{p}@{s}", p, s) for p in PHASES for s in LADDER]

    def send(self, peer: str, message) -> bool:
        phase, _, share = peer.partition("@")
        load = self._machine.load((work_of(message),))
        self._device.send(PHASES.index(phase), peer, message.step_id, 1, load, float(share))
        return True

    def receive(self):
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        self.now = self._device.next_s
        return [
            StepDone(job.worker_id, job.step_id, b"", self.now - job.started_s, 0)
            for _, job in self._device.advance(self.now)
        ]

    def bench(self) -> Bench:
        bench = Bench(layout(), self, self.receive, timeout_s=10.0, clock=lambda: self.now)
        bench.await_workers({(p, s) for p in PHASES for s in LADDER})
        return bench


def true_model() -> LatencyModel:
    padding = padded_sizes(layout(), CONFIG.scheduler)
    return LatencyModel(TRUTH, 0.3, {"prefill": 0.2, "decode": 0.5}, padding)


@pytest.mark.parametrize("prefill_ladder", [LADDER, (1.0,)])
def test_a_profile_predicts_what_was_measured(prefill_ladder):
    model = true_model()
    bench = VirtualWorkers(model, noise=0.02).bench()
    shares = replace(CONFIG.shares, prefill_ladder=prefill_ladder)
    config = replace(CONFIG, shares=shares)
    ladders = ladders_of(shares)
    samples = [s for trial in trials(layout(), BUDGET, ladders) for s in bench.run(trial)]
    made = fitted(samples, config, "a device", layout())
    assert (made.source, made.device, made.model) == ("measured", "a device", "m")
    assert made.sizes == profile.Sizes.of(layout())
    assert made.padding["prefill"] == (32, 64, 128, 256, 512)
    assert max(made.error.values()) < 0.03
    again = profile.model_of(profile.from_json(profile.to_json(made)))
    for sample in samples:
        wanted = model.predict(sample.work, sample.conditions)
        assert again.predict(sample.work, sample.conditions) == pytest.approx(wanted, rel=0.1)
    between = Work("prefill", 2, 2 * 65, 2 * 65, 65 * 66)  # runs as 256 tokens
    assert again.predict(between, Conditions(1.0)) == pytest.approx(
        model.predict(between, Conditions(1.0)), rel=0.1
    )


def test_a_saturation_below_all_shares_is_taken_for_the_most_that_it_can_be():
    """What is below the ladder is not predicted to have a bandwidth that nobody measured. The least
    share that ran is 0.25 beside 1.0: a fifth of the device."""
    truth = true_model()
    model = LatencyModel(TRUTH, 0.05, dict.fromkeys(PHASES, 0.0), truth.padding)
    bench = VirtualWorkers(model).bench()
    planned = trials(layout(), BUDGET, ladders_of(CONFIG.shares))
    made = fitted([s for t in planned for s in bench.run(t)], CONFIG, "a device", layout())
    assert made.saturation == 0.2
    assert made.rungs == {"prefill": LADDER, "decode": LADDER}


def test_each_phase_is_measured_at_its_own_shares():
    planned = list(trials(layout(), BUDGET, Ladders(prefill=(0.5, 1.0), decode=(0.25, 1.0))))
    alone = {(p, s) for t in planned if len(t.shares) == 1 for p, s in t.shares.items()}
    assert alone == {("prefill", 0.5), ("prefill", 1.0), ("decode", 0.25), ("decode", 1.0)}
    pairs = {(t.shares["prefill"], t.shares["decode"]) for t in planned if len(t.shares) == 2}
    assert pairs == {(0.5, 0.25), (0.5, 1.0), (1.0, 0.25), (1.0, 1.0)}


def test_steps_side_by_side_are_told_from_steps_alone():
    model = true_model()
    bench = VirtualWorkers(model).bench()
    prefill, decode = prefill_shapes(layout(), BUDGET)[-1], decode_shapes(layout())[-1]
    [alone] = bench.run(Trial({"decode": decode}, {"decode": 0.5}))
    assert alone.conditions == Conditions(0.5)
    assert alone.seconds == pytest.approx(model.predict(alone.work, alone.conditions))
    beside = Trial({"prefill": prefill, "decode": decode}, {"prefill": 1.0, "decode": 0.5})
    for sample in bench.run(beside):
        own, other = (1.0, 0.5) if sample.work.phase == "prefill" else (0.5, 1.0)
        assert sample.conditions == Conditions(own, other, 1.0)
        wanted = model.predict(sample.work, sample.conditions)
        assert sample.seconds == pytest.approx(wanted, rel=0.01)


def test_silence_ends_the_measurement():
    workers = VirtualWorkers(true_model())
    bench = workers.bench()

    def nothing():
        workers.now += 1.0
        return []

    bench._receive = nothing  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(EngineError, match=r"decode 1 @ 64.*nothing came in 10 s"):
        bench.run(Trial({"decode": decode_shapes(layout())[0]}, {"decode": 1.0}))


@given(st.integers(9, 9000), st.integers(16, 65536))
def test_one_share_is_enough_to_fit_prefill(length, budget):
    num_alone = len(FEATURES["prefill"].keys() - CONTENTION)
    assert len(prefill_shapes(layout(max_model_len=length), budget)) >= num_alone


@given(st.integers(2, 9000), st.integers(2, 300), st.integers(2, 600), st.integers(16, 4096))
def test_every_trial_is_a_step_that_the_engine_could_send(length, num_rows, num_pages, budget):
    sizes = layout(max_model_len=length, num_rows=num_rows, num_pages=num_pages)
    shapes = [*prefill_shapes(sizes, budget), *decode_shapes(sizes)]
    assert {shape.phase for shape in shapes} == {"prefill", "decode"}
    for shape in shapes:
        step = step_of(shape, 7, sizes)
        rows, contexts, pages = (
            np.frombuffer(b, np.int32) for b in (step.rows, step.context_lens, step.page_table)
        )
        assert 1 <= rows.min() <= rows.max() < num_rows
        assert np.unique(rows).size == rows.size
        assert 1 <= contexts.min() <= contexts.max() < length
        assert pages.size == rows.size * step.table_width
        assert 1 <= pages.min() <= pages.max() < num_pages
        assert step.table_width * sizes.page_size >= contexts.max()
        assert shape.num_tokens <= min(budget, shape.context)
