"""Whole engines on virtual clocks. Small loads: these run the real scheduler step by step."""

import argparse
import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from modelled_profile import coefficients

from semipd_jax import simulate
from semipd_jax.config import POLICIES
from semipd_jax.errors import ConfigError
from semipd_jax.messages import OTHER_PHASE
from semipd_jax.simulator import flags, report, workloads
from semipd_jax.simulator.link import Link
from semipd_jax.simulator.machine import Load
from semipd_jax.simulator.misses import Misses
from semipd_jax.simulator.platform import Platform
from semipd_jax.simulator.profiled import Profiled
from semipd_jax.simulator.run import Goal, run
from semipd_jax.simulator.systems import Setup, build, parse
from semipd_jax.simulator.targets import multiple_of_alone
from semipd_jax.simulator.traces import TraceRow
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner.latency import LatencyModel
from semipd_jax.tuner.policies import LADDERS
from semipd_jax.tuner.policy import Ladders
from semipd_jax.tuner.slo import SloTarget, SloTargets

SYSTEMS = (*POLICIES, "predictive+spf", "colocated", "chunked", "disaggregated")
TARGETS = SloTargets(SloTarget(ttft_ms=150.0, tpot_ms=60.0))


class ByHand:
    """A prompt token takes 1 ms, a decode step 10 ms, and nothing slows anything down."""

    def load(self, works):
        return Load(works)

    def alone_s(self, load, share):
        return sum(
            work.num_tokens * 1e-3 if work.phase == "prefill" else 10e-3 for work in load.works
        )

    def together_s(self, a, share_a, b, share_b):
        return self.alone_s(a, share_a), self.alone_s(b, share_b)


def by_hand(*, kv_tokens=10_000, hop_s=0.0) -> Platform:
    steady = {
        "prefill": coefficients("prefill", tokens=1.0),
        "decode": coefficients("decode", fixed=1e-2),
    }
    return Platform(
        name="by hand",
        source="modelled",
        notes=(),
        machine=ByHand(),
        page_size=16,
        kv_tokens=lambda _: kv_tokens,
        hop_s=hop_s,
        predictor=lambda: LatencyModel(steady, 1.0, {"prefill": 1.0, "decode": 1.0}),
        link=Link(bytes_per_s=1e6, latency_s=0.0, bytes_per_token=1000),
    )


def load(*rows: tuple[float, int, int]) -> Workload:
    return Workload(
        "by hand",
        tuple(TraceRow(arrival_s=at, input_len=n, output_len=m) for at, n, m in rows),
    )


def drawn(lengths, max_len=8192) -> Workload:
    return workloads.drawn("drawn", lengths, max_len=max_len, seed=0)


def simulated(name: str, workload: Workload, platform: Platform | None = None, **setup):
    made = Setup(platform=platform or by_hand(), targets=TARGETS, **({"noise": 0.0} | setup))
    return run(workload, build(parse(name), made, workload))


# ------------------------------------------------------------ timelines worked out by hand


@pytest.mark.parametrize("name", [s for s in SYSTEMS if s != "disaggregated"])
def test_a_request_alone(name):
    outcome = simulated(name, load((1.0, 100, 5)))
    assert outcome.ttft_s.tolist() == pytest.approx([0.1])
    assert outcome.tpot_s.tolist() == pytest.approx([0.01])


def test_disaggregation_pays_for_the_transfer_before_the_second_token():
    outcome = simulated("disaggregated", load((0.0, 100, 5)))
    assert outcome.ttft_s.tolist() == pytest.approx([0.1])
    # 100 tokens of 1000 bytes at 1 MB/s, then four steps.
    assert outcome.e2e_s.tolist() == pytest.approx([0.1 + 0.1 + 0.04])


def test_a_long_prompt_stops_decoding_only_where_they_share_a_worker():
    """A request of 50 tokens decodes while a prompt of 1000 arrives at 0.1 s."""
    rows = load((0.0, 50, 21), (0.1, 1000, 2))
    assert simulated("static:1,1", rows).e2e_s[0] == pytest.approx(0.25)
    # One decode step is under way and another one waits when the prompt arrives.
    assert simulated("colocated", rows).e2e_s[0] == pytest.approx(1.25)


def test_chunked_steps_take_all_rows_and_fill_up_with_prompt_tokens():
    """Steps of 64: with one row decoding, 63 prompt tokens each, 10 + 63 ms."""
    outcome = simulated("chunked", load((0.0, 64, 100), (0.0, 630, 2)), chunk_tokens=64)
    # 64 ms of the first prompt, a whole chunk of the second that was planned ahead, the rest.
    assert outcome.ttft_s[1] == pytest.approx(0.064 + 0.064 + 9 * 0.073, abs=0.08)


def test_the_hop_is_paid_once_where_steps_are_sent_ahead():
    outcome = simulated("static:1,1", load((0.0, 100, 11)), by_hand(hop_s=1e-3))
    assert outcome.ttft_s[0] == pytest.approx(0.101)
    assert outcome.e2e_s[0] == pytest.approx(0.101 + 0.001 + 10 * 0.01)


def test_spf_lets_short_prompts_pass():
    rows = load((0.0, 100, 1), (0.01, 900, 1), (0.02, 50, 1))
    spf, fcfs = (
        simulated(name, rows, chunk_tokens=128).ttft_s for name in ("static:1,1+spf", "static:1,1")
    )
    assert spf[2] < 0.4 < 0.9 < fcfs[2]


def test_ageing_bounds_for_how_long_short_prompts_pass():
    """A long prompt, and one of 128 tokens every 128 ms, as many as can be computed."""
    short = [(0.128 * i, 128, 1) for i in range(1, 30)]
    rows = load((0.0, 128, 1), (0.0, 900, 1), *short)
    soon, late = (
        simulated("static:1,1+spf", rows, chunk_tokens=128, ageing_tokens_per_s=speed).ttft_s[1]
        for speed in (2000.0, 200.0)
    )
    assert soon < 2.0 < 3.5 < late


# ------------------------------------------------------------ all systems


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_request_is_served_on_a_pool_that_forces_preemption(name):
    rows = load(*[(0.01 * i, 20 + 7 * (i % 9), 10 + 13 * (i % 5)) for i in range(24)])
    outcome = simulated(name, rows, by_hand(kv_tokens=256))
    assert outcome.served.all()
    assert (outcome.ttft_s > 0).all()
    assert outcome.counters["num_preemptions"] > 0


@pytest.mark.parametrize("name", ["predictive", "chunked", "disaggregated"])
def test_runs_are_determined_by_the_seed(name):
    rows = load(*[(0.05 * i, 40 + 17 * (i % 7), 3 + 5 * (i % 4)) for i in range(20)])

    def times(seed: int) -> list[float]:
        return simulated(name, rows, noise=0.05, seed=seed).e2e_s.tolist()

    assert times(0) == times(0)
    assert times(0) != times(1)


def test_each_rung_of_each_phase_is_a_process_that_takes_memory():
    asked = []

    def kv_tokens(num_processes: int) -> int:
        asked.append(num_processes)
        return 10_000

    ladders = Ladders(prefill=(1.0,), decode=(0.4, 1.0))
    platform = replace(by_hand(), kv_tokens=kv_tokens)
    names = ["colocated", "static:1,1", "static:1,1+idle", "static:1,0.2+idle"]
    for name in (*names, "static:0.4,0.2+spf+idle", "semi-pd", "predictive"):
        simulated(name, load((0.0, 10, 2)), platform, ladders=ladders)
    simulated("predictive", load((0.0, 10, 2)), platform)
    assert asked == [1, 2, 2, 3, 4, 3, 3, LADDERS["predictive"].num_workers]


@pytest.mark.parametrize(
    ("name", "alone"), [("static:0.5,0.4", ()), ("static:0.5,0.4+idle", (1.0,))]
)
def test_a_static_phase_alone_takes_all_under_the_idle_rule_only(name, alone):
    rows = load((0.0, 50, 40), (0.1, 200, 40))
    shares = simulated(name, rows).shares
    assert {share for _, share in shares["prefill"]} == {0.5, *alone}
    assert {share for _, share in shares["decode"]} == {0.4, *alone}


def test_phases_move_on_their_own_ladders():
    ladders = Ladders(prefill=(0.5, 1.0), decode=(0.2, 1.0))
    model = by_hand().predictor()
    model.yielding = {"prefill": 0.0, "decode": 0.0}  # so that decode's share matters to prefill
    rows = load(*[(0.3 * i, 200, 30) for i in range(10)])
    platform = replace(by_hand(), predictor=lambda: model)
    shares = simulated("predictive", rows, platform, ladders=ladders).shares
    assert {share for _, share in shares["prefill"]} <= {0.5, 1.0}
    assert {share for _, share in shares["decode"]} == {0.2, 1.0}


def test_prefixes_of_a_trace_are_found_in_the_cache():
    rows = tuple(
        TraceRow(arrival_s=5.0 * i, input_len=1100, output_len=2, hash_ids=ids)
        for i, ids in enumerate([(1, 2, 3), (1, 2, 4), (9, 8, 7)])
    )
    outcome = simulated("static:1,1", Workload("prefixes", rows))
    assert outcome.ttft_s.tolist() == pytest.approx([1.1, 1.1 - 1.024, 1.1])


def test_a_failed_request_is_a_miss():
    outcome = simulated("static:1,1", load((0.0, 10, 2), (0.0, 10, 2)))
    outcome.served[1] = False
    assert outcome.attainment(SloTarget()) == 0.5


def test_attainment_needs_both_targets():
    outcome = simulated("static:1,1", load((0.0, 100, 5), (10.0, 200, 1)))
    assert outcome.attainment(SloTarget(ttft_ms=150.0)) == 0.5
    assert outcome.attainment(SloTarget(tpot_ms=5.0)) == 0.5, "a single token has no TPOT to miss"
    assert outcome.attainment(SloTarget(ttft_ms=250.0, tpot_ms=11.0)) == 1.0


# ------------------------------------------------------------ runs for a goal


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("static:1,1", SloTarget(ttft_ms=100.0, tpot_ms=10.5)),
        ("disaggregated", SloTarget(ttft_ms=60.0)),
        ("colocated", SloTarget(tpot_ms=30.0)),
    ],
)
def test_a_run_with_a_goal_is_exact_where_it_reaches_it_and_below_it_elsewhere(name, target):
    setup = Setup(platform=by_hand(), targets=TARGETS, noise=0.0)
    rows = load(*[(0.05 * i, 20 + 7 * (i % 9), 1 + 4 * (i % 4)) for i in range(20)])

    def attainment(goal: Goal | None = None) -> float:
        return run(rows, build(parse(name), setup, rows), goal).attainment(target)

    exact = attainment()
    assert 0.3 < exact < 0.7
    for least in (0.1, exact, exact + 0.01, 0.99):
        found = attainment(Goal(target, least))
        assert found == exact if exact >= least else found <= exact < least


def test_a_run_ends_once_its_goal_is_out_of_reach():
    """Prompts of 300 ms every 100 ms: the second one waits longer than the target allows."""
    rows = load(*[(0.1 * i, 300, 1) for i in range(100)])
    made = build(parse("static:1,1"), Setup(platform=by_hand(), targets=TARGETS, noise=0.0), rows)
    outcome = run(rows, made, Goal(SloTarget(ttft_ms=450.0), 0.9))
    assert outcome.served.sum() < 10
    assert outcome.duration_s < 2.0


def test_whoever_must_have_ended_counts_before_it_ends():
    rows = [TraceRow(arrival_s=at, input_len=1, output_len=11) for at in (0.0, 0.5)]
    misses = Misses(rows, SloTarget(ttft_ms=100.0, tpot_ms=20.0))
    misses.pass_to(0.3)
    assert misses.num == 0
    misses.pass_to(0.4)
    misses.ended(0, ttft_s=0.05, tpot_s=0.04)
    assert misses.num == 1
    misses.ended(1, ttft_s=0.11, tpot_s=0.01)
    misses.pass_to(9.0)
    assert misses.num == 2
    refused = Misses(rows, SloTarget())
    refused.ended(0, ttft_s=np.nan, tpot_s=np.nan)
    assert refused.num == 1


# ------------------------------------------------------------ loads


def test_lengths_have_the_published_means():
    rows = drawn([workloads.LONGBENCH] * 20_000, max_len=100_000).rows
    assert np.mean([r.input_len for r in rows]) == pytest.approx(1738.3, rel=0.03)
    assert np.mean([r.output_len for r in rows]) == pytest.approx(90.7, rel=0.03)


def test_a_rate_stretches_time_only():
    workload = drawn([workloads.SHAREGPT] * 50)
    faster = workload.at(4.0)
    assert faster.rate == pytest.approx(4.0)
    assert [r.input_len for r in faster.rows] == [r.input_len for r in workload.rows]


def test_the_flipping_load_flips():
    workload = drawn(workloads.flipping(3000, 1000))
    rows = workload.rows
    means = [np.mean([r.input_len for r in rows[i : i + 1000]]) for i in (0, 1000, 2000)]
    assert means[1] > 1.5 * max(means[0], means[2])
    assert workload.num_segments == 3


def test_the_flipping_load_flips_several_times_unless_told_otherwise():
    parser = argparse.ArgumentParser()
    flags.add_load(parser)
    workload = flags.workload_of(parser.parse_args([]), flags.FLIPPING, 0)
    assert workload.num_segments == 5
    head = report.header(workload, TARGETS, origin="modelled", platform="")
    assert "2000 requests in 5 segments" in report.heading(head)
    plain = flags.workload_of(parser.parse_args([]), "sharegpt", 0)
    assert "segments" not in report.heading(
        report.header(plain, TARGETS, origin="modelled", platform="")
    )


def test_targets_are_multiples_of_a_request_alone():
    target = multiple_of_alone(ByHand(), load((0.0, 100, 10), (1.0, 300, 10)), 7.5)
    assert (target.ttft_ms, target.tpot_ms) == (pytest.approx(1500.0), pytest.approx(75.0))


# ------------------------------------------------------------ policies


def divided() -> Platform:
    """As by hand, but what both phases want of the device is divided between them."""
    steady = {
        "prefill": coefficients("prefill", tokens=1.0),
        "decode": coefficients("decode", products=1e-2),
    }
    model = LatencyModel(steady, 1.0, {"prefill": 0.0, "decode": 0.0})
    return replace(by_hand(), machine=Profiled(model), predictor=lambda: deepcopy(model))


@pytest.mark.parametrize(
    ("target", "ladders", "moved", "every_s"),
    [
        (SloTarget(300.0, 80.0), Ladders(prefill=(1.0,), decode=(0.2, 1.0)), "decode", 0.5),
        (SloTarget(20e3, 15.0), Ladders(prefill=(0.2, 1.0), decode=(1.0,)), "prefill", 0.1),
    ],
)
def test_predictive_takes_from_a_phase_what_only_the_other_needs(target, ladders, moved, every_s):
    """With half of the device each, a prompt takes 400 ms and a token 20 ms."""
    rows = load(*[(every_s * i, 200, 60) for i in range(8)])
    setup = Setup(platform=divided(), targets=SloTargets(target), ladders=ladders, noise=0.0)
    static, predictive = (
        run(rows, build(parse(name), setup, rows)) for name in ("static:1,1+spf", "predictive+spf")
    )
    assert static.attainment(target) < 0.5 < 0.8 < predictive.attainment(target)
    shares = {
        phase: {share for _, share in changes} for phase, changes in predictive.shares.items()
    }
    assert (shares[moved], shares[OTHER_PHASE[moved]]) == ({0.2, 1.0}, {1.0})


# ------------------------------------------------------------ names and the command


@pytest.mark.parametrize(
    "name",
    [
        "best",
        "static:1",
        "colocated:1,1",
        "predictive+lifo",
        "predictive+idle",
        "static:1,1+spf+spf",
    ],
)
def test_unknown_systems_are_refused(name):
    with pytest.raises(ConfigError, match="system is"):
        parse(name)


def test_command_prints_that_times_are_modelled(tmp_path, capsys):
    out = tmp_path / "out.json"
    given = ["--num-requests", "20", "--rate", "5", "--systems", "colocated static:1,0.4"]
    given += ["--length-scale", "0.1"]
    assert simulate.main([*given, "--json", str(out)]) == 0
    assert "MODELLED, not measured: NVIDIA H100" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["origin"] == "modelled"
    assert result["systems"].keys() == {"colocated", "static:1,0.4"}
    assert result["systems"]["colocated"]["num_failed"] == 0


def test_seeds_take_parts_of_a_trace(tmp_path):
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:00:{i:02d}.5,{100 + i},{i + 1}" for i in range(5)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    parser = argparse.ArgumentParser()
    flags.add_load(parser)
    args = parser.parse_args(["--num-requests", "2"])
    parts = [flags.workload_of(args, str(trace), seed) for seed in range(3)]
    lengths = [[row.input_len for row in part.rows] for part in parts]
    assert lengths == [[100, 101], [102, 103], [104]]
    assert [part.rows[0].arrival_s for part in parts] == [0.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="seed is 3"):
        flags.workload_of(args, str(trace), 3)


@pytest.mark.parametrize(
    ("given", "prefill", "decode"),
    [
        ("--share-ladder 0.5,1", (0.5, 1.0), (0.5, 1.0)),
        ("--share-ladder 0.5,1 --prefill-share-ladder 1", (1.0,), (0.5, 1.0)),
        ("--decode-share-ladder 0.1,1", (1.0,), (0.1, 1.0)),
    ],
)
def test_ladders_are_given_for_both_phases_or_for_each(given, prefill, decode):
    parser = argparse.ArgumentParser()
    flags.add_engine(parser)
    assert flags.ladders_of(parser.parse_args(given.split())) == Ladders(prefill, decode)
    assert flags.ladders_of(parser.parse_args([])) is None


def test_defaults_of_flags_are_those_of_a_setup():
    parser = argparse.ArgumentParser()
    for add in (flags.add_load, flags.add_platform, flags.add_engine):
        add(parser)
    made = flags.setup_of(flags.completed(parser.parse_args([])), load((0.0, 10, 2), (1.0, 10, 2)))
    usual = Setup(platform=made.platform, targets=made.targets)
    assert made == usual
    assert made.targets.attainment == SloTargets().attainment


def test_bad_flags_are_explained(capsys):
    assert simulate.main(["--decode-share-ladder", "0.4,0.9"]) == 2
    assert "decode_share_ladder (or share_ladder) is (0.4, 0.9)" in capsys.readouterr().err
    assert simulate.main(["--systems", "best"]) == 2
    assert "system is 'best'; allowed: static" in capsys.readouterr().err
    assert simulate.main(["--hardware", "h300"]) == 2
    assert "h100-llama-3-8b" in capsys.readouterr().err
    assert simulate.main(["--block-size", "32"]) == 2
    assert "--block-size is 32; allowed: only with --profile" in capsys.readouterr().err
