import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelled_profile import TRUTH

from semipd_jax.config import POLICIES
from semipd_jax.errors import ConfigError
from semipd_jax.tuner.latency import Conditions, LatencyModel, Sample
from semipd_jax.tuner.policies import make_tuner
from semipd_jax.tuner.policy import FULL, FinishedRequest, Ladders, Observation, Policy, Shares
from semipd_jax.tuner.predictive import Predictive
from semipd_jax.tuner.refined import RefinedModel
from semipd_jax.tuner.replan import PUBLISHED_LADDER, Replan
from semipd_jax.tuner.semi_pd import SemiPd
from semipd_jax.tuner.slo import SloTarget, SloTargets
from semipd_jax.tuner.work import Work

LADDER = (0.2, 0.4, 0.6, 0.8, 1.0)
LADDERS = Ladders(LADDER, LADDER)
YIELDING = {"prefill": 0.0, "decode": 0.0}


def twice_as_slow() -> LatencyModel:
    return LatencyModel({p: 2 * c for p, c in TRUTH.items()}, 1 / 3, YIELDING)


def model() -> LatencyModel:
    return LatencyModel(TRUTH, 1 / 3, YIELDING)


def targets(*, ttft_ms=1000.0, tpot_ms=30.0) -> SloTargets:
    return SloTargets(SloTarget(ttft_ms, tpot_ms))


def decode_work(rows: int, context: int) -> Work:
    return Work("decode", rows, rows, rows * context, rows * context)


def prefill_work(tokens: int) -> Work:
    return Work("prefill", 1, tokens, tokens, tokens * tokens // 2)


PROMPT, LOAD = prefill_work(2048), decode_work(64, 1000)


def observe(
    phase="decode",
    *,
    prefill=PROMPT,
    decode=LOAD,
    shares=FULL,
    kv_used=0.3,
    finished=(),
) -> Observation:
    return Observation(
        now_s=0.0,
        phase=phase,
        prefill=prefill,
        decode=decode,
        shares=shares,
        kv_used=kv_used,
        finished=finished,
    )


def settled(policy: Policy, phase="decode", *, steps=5, shares=FULL, **what) -> Shares:
    """Where a policy ends up when the load stays as it is."""
    for _ in range(steps):
        shares = policy.decide(observe(phase, shares=shares, **what)).shares
    return shares


# ------------------------------------------------------------ predictive

loads = st.builds(decode_work, st.integers(1, 256), st.integers(10, 4000))
prompts = st.builds(prefill_work, st.integers(16, 8192))
phases = st.sampled_from(["prefill", "decode"])


@settings(max_examples=40)
@given(loads, prompts, st.sampled_from(LADDER), st.floats(2, 200), st.floats(2, 200))
def test_a_tighter_tpot_never_gives_decode_less(decode, prefill, sent, a, b):
    tight, loose = sorted((a, b))
    got = [
        settled(
            Predictive(LADDERS, targets(tpot_ms=tpot), model()),
            decode=decode,
            prefill=prefill,
            shares=Shares(sent, 1.0),
        ).decode
        for tpot in (tight, loose)
    ]
    assert got[0] >= got[1]


@settings(max_examples=40)
@given(loads, prompts, phases, st.floats(2, 200))
def test_decode_holds_its_target_whenever_a_pair_can(decode, prefill, phase, tpot_ms):
    predictive = Predictive(LADDERS, targets(tpot_ms=tpot_ms), model())
    shares = settled(predictive, phase, decode=decode, prefill=prefill)
    terms = model().terms(decode)
    sent = LADDER if phase == "prefill" else (1.0,)
    fastest = min(terms.at(y, x) for x in sent for y in LADDER)
    if fastest <= 0.9 * tpot_ms / 1e3:
        assert terms.at(shares.decode, shares.prefill) <= 0.9 * tpot_ms / 1e3
    else:
        assert terms.at(shares.decode, shares.prefill) == pytest.approx(fastest)


def test_decode_gets_just_enough():
    predictive = Predictive(LADDERS, targets(tpot_ms=24.0), model())
    shares = settled(predictive)
    terms = model().terms(decode_work(64, 1000))
    lower = max(rung for rung in LADDER if rung < shares.decode)
    assert terms.at(shares.decode, 1.0) <= 0.0216 < terms.at(lower, 1.0)


@pytest.mark.parametrize("alone", ["prefill", "decode"])
def test_a_phase_that_is_alone_takes_everything(alone):
    predictive = Predictive(LADDERS, targets(), model())
    other = "decode" if alone == "prefill" else "prefill"
    decision = predictive.decide(observe(alone, shares=Shares(0.2, 0.2), **{other: None}))
    assert decision.shares.of(alone) == 1.0
    assert decision.reason == "alone"


def test_decode_gets_more_at_once_and_less_when_it_can_spare_it():
    predictive = Predictive(LADDERS, targets(tpot_ms=24.0), model())
    low = settled(predictive, decode=decode_work(4, 500)).decode
    busy = decode_work(128, 1000)
    high = predictive.decide(observe(decode=busy, shares=Shares(1.0, low))).shares.decode
    assert high > low
    calm = predictive.decide(observe(decode=decode_work(4, 500), shares=Shares(1.0, high)))
    assert calm.shares.decode == low


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), phases, st.integers(2, 250), st.integers(100, 4000))
def test_no_flapping_under_noise(seed, phase, rows, context):
    """Loads that jitter by 3 % around a point, wherever it lies, change shares at most twice."""
    rng = np.random.default_rng(seed)
    predictive = Predictive(LADDERS, targets(tpot_ms=40.0), model())
    shares, changes = settled(predictive, phase, decode=decode_work(rows, context)), 0
    for _ in range(100):
        jitter = 1 + 0.03 * rng.uniform(-1, 1)
        work = decode_work(rows, max(1, round(context * jitter)))
        new = predictive.decide(observe(phase, decode=work, shares=shares)).shares
        changes += new != shares
        shares = new
    assert changes <= 2


def test_kv_pressure_switches_the_objective_and_has_hysteresis():
    predictive = Predictive(LADDERS, targets(tpot_ms=200.0), model())

    def share(kv_used: float) -> float:
        return settled(predictive, kv_used=kv_used).decode

    relaxed = share(0.65)
    assert share(0.75) > relaxed
    assert share(0.65) > relaxed, "0.65 is not below where the pressure ends"
    assert share(0.55) == relaxed


@settings(max_examples=40)
@given(loads, prompts)
def test_under_pressure_prefill_stays_near_its_best(decode, prefill):
    predictive = Predictive(LADDERS, targets(), model())
    shares = settled(predictive, "prefill", decode=decode, prefill=prefill, kv_used=0.9)
    terms = model().terms(prefill)
    best = min(terms.at(x, y) for x in LADDER for y in LADDER)
    assert terms.at(shares.prefill, shares.decode) <= 1.3 * best * (1 + 1e-9)


def test_the_tightest_class_that_decodes_decides():
    slo = SloTargets(SloTarget(tpot_ms=200.0), {1: SloTarget(tpot_ms=20.0)})
    assert slo.tightest_tpot_s({0}) == 0.2
    assert slo.tightest_tpot_s({0, 1}) == 0.02
    assert SloTargets().tightest_tpot_s({0}) == float("inf")


@settings(max_examples=40)
@given(loads, prompts, phases, st.floats(2, 200), st.floats(0, 1))
def test_each_phase_moves_on_its_own_ladder(decode, prefill, phase, tpot_ms, kv_used):
    ladders = Ladders(prefill=(0.6, 1.0), decode=(0.2, 0.8, 1.0))
    predictive = Predictive(ladders, targets(tpot_ms=tpot_ms), model())
    shares = settled(predictive, phase, decode=decode, prefill=prefill, kv_used=kv_used)
    assert shares.prefill in ladders.prefill
    assert shares.decode in ladders.decode


def test_a_phase_with_one_rung_stays_there():
    tight = targets(tpot_ms=2.0)
    for ladders in (Ladders((1.0,), LADDER), Ladders(LADDER, (1.0,))):
        shares = settled(Predictive(ladders, tight, model()), "prefill")
        assert shares.decode == 1.0, "out of reach: decode first"
        assert shares.prefill == ladders.prefill[0]


def test_a_decision_explains_itself():
    decision = Predictive(LADDERS, targets(), model()).decide(observe())
    record = json.loads(json.dumps(decision.record()))
    assert record["shares"].keys() == {"prefill", "decode"}
    assert record["inputs"] == {
        "kv_used": 0.3,
        "budget_s": pytest.approx(0.027),
        "prefill_tokens": PROMPT.num_tokens,
        "prefill_context_tokens": PROMPT.context_tokens,
        "prefill_pairs": PROMPT.num_pairs,
        "decode_rows": LOAD.num_rows,
        "decode_context_tokens": LOAD.context_tokens,
        "prefill_share": 1.0,
        "decode_share": 1.0,
    }
    terms = model().terms(decode_work(64, 1000))
    expected = terms.at(decision.shares.decode, decision.shares.prefill)
    assert record["predicted_decode_s"] == pytest.approx(expected)
    assert record["reason"]


# ------------------------------------------------------------ semi-pd, Algorithm 1


def window(*, ttft_s, tpot_s, queue_s=0.0, num=10, gap_s=1.0):
    return [FinishedRequest(i * gap_s, queue_s, ttft_s - queue_s, tpot_s) for i in range(num)]


def after(policy: Policy, finished, *, now_s=0.0) -> Shares:
    return policy.decide(replace(observe(finished=finished), now_s=now_s)).shares


def algorithm_1(start: Shares, *, ttft_ms=300.0, tpot_ms=150.0, max_step=3) -> SemiPd:
    slo = targets(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    return SemiPd(LADDERS, slo, window_size=10, max_step=max_step, start=start)


def test_algorithm_1_step_by_step():
    """Worked by hand from Figure 10's curves, at (0.6, 0.6) with 1 request/s and TTFT 0.5 s.

    x' = 0.6 / 1.2 = 0.5; all of TTFT is prefill, so λ = 1 · 0.5 · 0.5 = 0.25.
      shape(0.5)   = 0.6809 / 0.25    + 0.022 = 2.7456
      x = 0.8: x' = 0.8 / 1.4 = 0.57143, shape = 0.6809 / 0.32143 + 0.022 = 2.14036: 0.38979 s
      x = 1.0: x' = 1.0 / 1.6 = 0.625,   shape = 0.6809 / 0.375   + 0.022 = 1.83773: 0.33467 s
      x is 1, so y falls to 0.4: x' = 1 / 1.4 = 0.71429, shape = 1.48855: 0.27108 s
    A target of 0.35 s needs two steps, one of 0.3 s needs three, one of 0.4 s needs one.
    """
    finished = window(ttft_s=0.5, tpot_s=0.1)
    start = Shares(0.6, 0.6)
    assert after(algorithm_1(start, ttft_ms=400.0), finished) == Shares(0.8, 0.6)
    assert after(algorithm_1(start, ttft_ms=350.0), finished) == Shares(1.0, 0.6)
    assert after(algorithm_1(start, ttft_ms=300.0), finished) == Shares(1.0, 0.4)
    assert after(algorithm_1(start, ttft_ms=300.0, max_step=2), finished) == Shares(1.0, 0.6)
    decision = algorithm_1(start, ttft_ms=300.0).decide(observe(finished=finished))
    assert decision.predicted_prefill_s == pytest.approx(0.27108, abs=1e-5)


def test_algorithm_1_raises_decode_and_then_lowers_prefill():
    """y' = 0.8 / 1.8: 0.6284 · 2.25 + 0.3818 = 1.79570 at 0.2 s a token.

    y = 1.0 gives y' = 1 / 2: 1.63860, 0.18250 s.
    Then x = 0.8 gives y' = 1 / 1.8: 1.51292, 0.16850 s.
    """
    finished = window(ttft_s=0.1, tpot_s=0.2)
    start = Shares(1.0, 0.8)
    assert after(algorithm_1(start, tpot_ms=190.0), finished) == Shares(1.0, 1.0)
    assert after(algorithm_1(start, tpot_ms=170.0), finished) == Shares(0.8, 1.0)


def test_algorithm_1_keeps_its_shares_when_both_hold_and_when_both_fail():
    start = Shares(0.6, 0.8)
    assert after(algorithm_1(start), window(ttft_s=0.1, tpot_s=0.1)) == start
    assert after(algorithm_1(start), window(ttft_s=9.0, tpot_s=0.9)) == start


def test_algorithm_1_waits_for_a_full_window():
    policy = algorithm_1(Shares(0.6, 0.6))
    finished = window(ttft_s=0.5, tpot_s=0.1)
    assert after(policy, finished[:9]) == Shares(0.6, 0.6)
    assert after(policy, finished[9:]) != Shares(0.6, 0.6)


def test_algorithm_1_decides_in_a_quiet_hour_too():
    """60 of 400 requests, one a second."""
    slo, finished = targets(ttft_ms=300.0, tpot_ms=150.0), window(ttft_s=0.5, tpot_s=0.1, num=60)
    policy = SemiPd(LADDERS, slo, start=Shares(0.6, 0.6))
    assert after(policy, finished[:40]) == Shares(0.6, 0.6)
    assert after(policy, finished[40:], now_s=59.0) == Shares(0.6, 0.6)
    assert after(policy, (), now_s=60.0) == Shares(1.0, 0.4)


def test_requests_that_took_long_are_no_pause():
    """One a second, and every tenth one arrived two minutes before it ended."""
    slo, finished = targets(ttft_ms=300.0, tpot_ms=150.0), window(ttft_s=0.5, tpot_s=0.1, num=60)
    finished = tuple(
        replace(r, arrival_s=r.arrival_s - 120.0 * (i % 10 == 9)) for i, r in enumerate(finished)
    )
    policy = SemiPd(LADDERS, slo, start=Shares(0.6, 0.6))
    assert after(policy, finished[:40]) == Shares(0.6, 0.6)
    assert after(policy, finished[40:], now_s=60.0) != Shares(0.6, 0.6)


def test_no_window_spans_a_pause():
    slo, finished = targets(ttft_ms=300.0, tpot_ms=150.0), window(ttft_s=0.5, tpot_s=0.1, num=60)
    policy = SemiPd(LADDERS, slo, start=Shares(0.6, 0.6))
    assert after(policy, finished[:49]) == Shares(0.6, 0.6)
    later = [replace(r, arrival_s=3600.0 + r.arrival_s) for r in finished]
    assert after(policy, later[:40], now_s=3640.0) == Shares(0.6, 0.6)
    assert after(policy, later[40:], now_s=3660.0) == Shares(0.6, 0.6)
    assert after(policy, (), now_s=3700.0) == Shares(1.0, 0.4)


def test_requests_that_saw_the_old_shares_do_not_count():
    policy = algorithm_1(Shares(0.6, 0.6), ttft_ms=400.0)
    assert after(policy, window(ttft_s=0.5, tpot_s=0.1), now_s=10.0) == Shares(0.8, 0.6)
    late = window(ttft_s=0.5, tpot_s=0.1)
    assert after(policy, late, now_s=11.0) == Shares(0.8, 0.6), "they arrived before 10 s"
    since = [replace(r, arrival_s=10.0 + r.arrival_s) for r in late]
    assert after(policy, since, now_s=30.0) == Shares(1.0, 0.4)


def test_algorithm_1_judges_requests_by_what_they_were_promised():
    """Priority 1 was promised ten times as much, priority 2 nothing."""
    classes = {1: SloTarget(3000.0, 1500.0), 2: SloTarget()}
    slo = replace(targets(ttft_ms=300.0, tpot_ms=150.0), by_class=classes)
    start, finished = Shares(0.6, 0.6), window(ttft_s=0.5, tpot_s=0.1)
    for priority, expected in ((0, Shares(1.0, 0.4)), (1, start), (2, start)):
        policy = SemiPd(LADDERS, slo, window_size=10, start=start)
        assert after(policy, [replace(r, priority=priority) for r in finished]) == expected


def test_algorithm_1_does_not_stumble_over_the_pole():
    """Requests that arrive faster than prefill serves them: the curve's pole lies beyond x'."""
    finished = window(ttft_s=5.0, tpot_s=0.1, gap_s=0.01)
    assert after(algorithm_1(Shares(0.6, 0.6)), finished) == Shares(1.0, 0.4)


def test_algorithm_1_moves_each_phase_on_its_own_ladder():
    """As in the step by step test, with no rung of prefill between 0.6 and 1, and decode's at 0.3:
    x' = 1 / 1.3 = 0.76923, shape = 0.6809 / 0.51923 + 0.022 = 1.33336: 0.24282 s."""
    ladders = Ladders(prefill=(0.6, 1.0), decode=(0.3, 0.6, 1.0))
    slo, finished = targets(ttft_ms=300.0, tpot_ms=150.0), window(ttft_s=0.5, tpot_s=0.1)
    policy = SemiPd(ladders, slo, window_size=10, start=Shares(0.6, 0.6))
    decision = policy.decide(observe(finished=finished))
    assert decision.shares == Shares(1.0, 0.3)
    assert decision.predicted_prefill_s == pytest.approx(0.24282, abs=1e-5)


# ------------------------------------------------------------ the public branch's rules


def replan(start: Shares, *, ttft_ms=500.0, tpot_ms=100.0) -> Replan:
    slo = targets(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    return Replan(Ladders(PUBLISHED_LADDER, PUBLISHED_LADDER), slo, window_size=10, start=start)


@pytest.mark.parametrize(
    ("start", "ttft_s", "tpot_s", "expected"),
    [
        # Both hold: slack is not harvested. 90 ms is within 1.1 of 100 ms.
        (Shares(0.9, 0.9), 0.1, 0.09, Shares(0.9, 0.9)),
        # Both fail: to (1, 1), unless a share is 1 already.
        (Shares(0.9, 0.9), 0.9, 0.2, Shares(1.0, 1.0)),
        (Shares(1.0, 0.9), 0.9, 0.2, Shares(1.0, 0.9)),
        # TPOT 95 ms fails its guard, but 0.92 is predicted in time: the shortest step.
        (Shares(0.9, 0.9), 0.1, 0.095, Shares(0.9, 0.92)),
        # Out of reach: as far as three steps go.
        (Shares(0.9, 0.9), 0.1, 0.2, Shares(0.9, 0.96)),
        # Decode has everything: prefill gives way as far as its target allows.
        (Shares(0.98, 1.0), 0.1, 0.2, Shares(0.92, 1.0)),
        # TTFT, the other way round.
        (Shares(0.9, 0.9), 2.0, 0.05, Shares(0.96, 0.9)),
        (Shares(1.0, 0.98), 2.0, 0.05, Shares(1.0, 0.92)),
        # The floor.
        (Shares(0.8, 1.0), 0.1, 0.2, Shares(0.8, 1.0)),
    ],
)
def test_public_replan_rules(start, ttft_s, tpot_s, expected):
    finished = window(ttft_s=ttft_s, tpot_s=tpot_s)
    assert after(replan(start), finished) == expected


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "expected"),
    [(0.1, 0.2, Shares(0.9, 1.0)), (2.0, 0.05, Shares(1.0, 0.95))],
)
def test_public_rules_move_each_phase_on_its_own_ladder(ttft_s, tpot_s, expected):
    ladders = Ladders(prefill=(0.9, 1.0), decode=(0.95, 1.0))
    slo = targets(ttft_ms=500.0, tpot_ms=100.0)
    policy = Replan(ladders, slo, window_size=10, start=Shares(1.0, 1.0))
    assert after(policy, window(ttft_s=ttft_s, tpot_s=tpot_s)) == expected


# ------------------------------------------------------------ tuner


def test_policies_by_name():
    for name in POLICIES:
        tuner = make_tuner(name, ladders=LADDERS, targets=targets(), model=RefinedModel(model()))
        assert tuner.decide(observe()).shares.prefill in LADDER


@pytest.mark.parametrize("ladder", [(), (0.5,), (1.0, 0.5), (0.0, 1.0), (0.5, 0.5, 1.0)])
def test_bad_ladders_are_refused(ladder):
    for ladders, named in (((ladder, LADDER), "prefill"), ((LADDER, ladder), "decode")):
        with pytest.raises(ConfigError, match=rf"{named}_share_ladder \(or share_ladder\) is"):
            Ladders(*ladders)


def test_steps_refine_the_model_that_the_policy_predicts_with():
    refined, machine = RefinedModel(model()), twice_as_slow()
    tuner = make_tuner("predictive", ladders=LADDERS, targets=targets(), model=refined)
    rng = np.random.default_rng(0)
    for _ in range(4000):
        rows, context = int(rng.integers(1, 200)), int(rng.integers(50, 3000))
        conditions = Conditions(float(rng.choice(LADDER)), 1.0, float(rng.integers(0, 2)))
        for work in (decode_work(rows, context), prefill_work(int(rng.integers(16, 4096)))):
            tuner.step_done(Sample(work, conditions, machine.predict(work, conditions)))
    conditions = Conditions(0.6, 1.0, 1.0)
    for work in (decode_work(100, 700), prefill_work(2048)):
        expected = machine.predict(work, conditions)
        assert refined.model.predict(work, conditions) == pytest.approx(expected, rel=0.05)
    assert all(0 < error.mean < 0.5 for error in refined.errors.values())
