import asyncio
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from benchmarks.goodput import __main__ as goodput
from benchmarks.goodput import live, plots, statics
from benchmarks.goodput.__main__ import main
from benchmarks.goodput.bootstrap import mean_interval, ratio_interval
from benchmarks.goodput.live import flags_of, limits_of, outcome_of
from benchmarks.goodput.results import result_of
from benchmarks.goodput.search import highest, take_turns
from benchmarks.goodput.tables import OURS, agreement, goodputs, markdown, ratios
from benchmarks.load import GeneratorHealth, LoadRun
from benchmarks.metrics import Arrival, RequestRecord
from semipd_jax import serve
from semipd_jax.errors import ConfigError, UnavailableError
from semipd_jax.simulator.run import Outcome
from semipd_jax.simulator.systems import System, parse
from semipd_jax.tuner.policy import Ladders
from semipd_jax.tuner.slo import SloTarget, SloTargets
from semipd_server.pb import control_pb2 as pb

LADDERS = Ladders(prefill=(1.0,), decode=(0.4, 1.0))
TARGETS = SloTargets(SloTarget(ttft_ms=100.0, tpot_ms=50.0))


def outcome(ttft_s: float, shares=None, num: int = 10, num_failed: int = 0) -> Outcome:
    served = np.arange(num) >= num_failed
    times = np.where(served, ttft_s, np.nan)
    return Outcome(times, times / 10, 2 * times, served, 10.0, {}, shares or {})


@dataclass
class Saturates:
    """In time up to a rate, which may depend on the seed."""

    name: str
    limit: float
    log: list

    @contextmanager
    def running(self, seed):
        self.log.append((self.name, seed))
        yield lambda rate: outcome(0.05 if rate <= self.limit + seed else 0.5)


# ------------------------------------------------------------ search


@given(st.floats(0.02, 500.0), st.floats(0.1, 100.0), st.floats(0.005, 0.2))
def test_the_search_finds_where_a_rate_no_longer_holds(limit, start, precision):
    found = highest(lambda rate: rate <= limit, start, 0.01, precision)
    assert found <= limit < found * (1 + precision) * (1 + 1e-9)


def test_a_rate_that_never_holds_is_zero():
    tried = []
    assert highest(lambda rate: bool(tried.append(rate)), 4.0, 0.5, 0.02) == 0.0
    assert 0.5 <= min(tried) < 0.5 * 1.5


def test_a_load_that_bears_any_rate_is_refused():
    with pytest.raises(ValueError, match="too short"):
        highest(lambda rate: True, 4.0, 0.1, 0.02)


def test_subjects_take_turns_seed_after_seed():
    log, told = [], []
    subjects = [Saturates("a", 5.0, log), Saturates("b", 10.0, log)]
    found = take_turns(
        subjects,
        TARGETS,
        [0, 1],
        start_rate=2.0,
        least_rate=0.1,
        precision=0.01,
        progress=told.append,
    )
    assert log == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [one.rate for one in found["a"]] == pytest.approx([5.0, 6.0], rel=0.01)
    assert [one.rate for one in found["b"]] == pytest.approx([10.0, 11.0], rel=0.01)
    assert len(told) == 4


def test_failed_requests_are_misses():
    @contextmanager
    def running(seed):
        yield lambda rate: outcome(0.05, num_failed=2 if rate > 3 else 1)

    subject = type("Fails", (), {"name": "fails", "running": staticmethod(running)})()
    found = take_turns(
        [subject],
        TARGETS,
        [0],
        start_rate=1.0,
        least_rate=0.1,
        precision=0.01,
        progress=lambda _: None,
    )
    assert found["fails"][0].rate == pytest.approx(3.0, rel=0.01)


# ------------------------------------------------------------ intervals


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=6))
def test_intervals_lie_between_the_seeds_and_hold_the_mean(values):
    low, high = mean_interval(values)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= low <= np.mean(values) + slack
    assert np.mean(values) - slack <= high <= max(values) + slack


def test_ratios_are_of_pairs():
    """Seeds that are easy for one are easy for the other: their ratio is known exactly."""
    below = [1.0, 5.0, 20.0]
    assert ratio_interval([2 * v for v in below], below) == pytest.approx((2.0, 2.0))
    assert ratio_interval([1.0], [0.0]) == (np.inf, np.inf)


# ------------------------------------------------------------ results


def test_shares_over_time_are_means_over_parts_of_the_run():
    shares = {"prefill": [(0.0, 1.0), (5.0, 0.5)], "decode": [(2.5, 0.2)]}
    log = []
    subject = Saturates("a", 5.0, log)
    found = take_turns(
        [subject],
        TARGETS,
        [0],
        start_rate=2.0,
        least_rate=0.1,
        precision=0.5,
        progress=lambda _: None,
    )
    one = found["a"][0]
    one.trials[one.rate] = outcome(0.05, shares)
    over_time = result_of([one], TARGETS)["shares"]
    ends, prefill = over_time["ends_s"], over_time["prefill"]
    assert ends[-1] == 10.0
    assert [prefill[i] for i, end in enumerate(ends) if end <= 5.0][-1] == 1.0
    assert np.mean(prefill) == pytest.approx(0.75)
    assert set(over_time["decode"]) == {0.2}


def load(**goodput: list[float]) -> dict:
    return {
        "workload": "w",
        "systems": {
            name.replace("static", "static:1,1"): {
                "goodput": sum(rates) / len(rates),
                "interval": [min(rates), max(rates)],
                "seeds": [{"goodput": rate} for rate in rates],
            }
            for name, rates in goodput.items()
        },
    }


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_tables_have_the_papers_ratios_beside_ours():
    loads = [load(static=[4.0, 6.0], predictive=[6.0, 9.0]), load(predictive=[1.0])]
    assert cells(goodputs(loads))[2:] == [
        ["static:1,1", "5.00 (4.00-6.00)", "-"],
        ["predictive", "7.50 (6.00-9.00)", "1.00"],
    ]
    assert cells(ratios(loads))[2:] == [
        ["predictive / static:1,1", "1.11", "1.50 (1.50-1.50)", "-"]
    ]


def test_ours_is_compared_under_the_same_order_too():
    one = load(**{"predictive+spf": [6.0], "colocated": [4.0], "colocated+spf": [5.0]})
    assert cells(ratios([one]))[2:] == [
        ["predictive+spf / colocated", "1.72", "1.50"],
        ["predictive+spf / colocated+spf", "", "1.20"],
    ]


def test_agreement_is_of_what_both_have():
    here, there = load(static=[4.0], predictive=[6.0]), load(static=[5.0], chunked=[1.0])
    assert cells(agreement([here], [there]))[2:] == [["w", "static:1,1", "4.00", "5.00", "-20%"]]


@pytest.mark.parametrize(("num_requests", "hint"), [(500, True), (800, False)])
def test_policies_that_never_acted_are_named(num_requests, hint):
    one = load(static=[5.0], predictive=[6.0], chunked=[1.0])
    one["systems"]["semi-pd"] = dict(one["systems"]["predictive"])
    for name, switches in (("static:1,1", [0, 0]), ("predictive", [0, 3]), ("semi-pd", [0, 0])):
        counters = dict(zip(("prefill_num_switches", "decode_num_switches"), switches, strict=True))
        one["systems"][name]["seeds"] = [{"goodput": 6.0, "at_goodput": {"counters": counters}}]
    one["systems"]["chunked"]["seeds"][0]["at_goodput"] = {"counters": {}}
    slo = {"ttft_ms": 100.0, "tpot_ms": None, "attainment": 0.9}
    of = {
        "origin": "modelled",
        "platform": "p",
        "slo": slo,
        "num_requests": num_requests,
        "run": {},
    }
    text = markdown([one | of | {"mean_input_tokens": 1.0, "mean_output_tokens": 1.0}])
    (line,) = (line for line in text.splitlines() if "no share moved" in line)
    assert "more processes: semi-pd" in line
    assert "predictive" not in line
    acts = "acts after 400 finished requests, or 50 once a minute has passed"
    assert (f"{acts}, and there are 500" in line) == hint


# ------------------------------------------------------------ static pairs


def test_static_pairs_come_with_the_idle_rule_where_it_matters(monkeypatch):
    monkeypatch.setattr(statics, "SHARES", (0.4, 1.0))
    bases = ["static:0.4,0.4", "static:0.4,1", "static:1,0.4"]
    idle = [base + option for base in bases for option in ("", "+idle")]
    assert statics.static_pairs() == [
        base + order for base in [*idle, "static:1,1"] for order in ("", "+spf")
    ]


@dataclass(frozen=True)
class Attains:
    """As a simulation that knows its attainments; below `least` it tells too little, as those do.

    Attributes:
      met: shares and order → attainment of each seed.
    """

    system: System
    met: dict
    setup: SimpleNamespace
    rates: list

    @property
    def name(self):
        return self.system.name

    def attainment(self, seed, rate, least):
        self.rates.append(rate)
        met = self.met.get((self.system.shares.decode, self.system.order), (0.0, 0.0, 0.0))[seed]
        return met if met >= least else met / 2


def test_better_statics_are_those_that_hold_on_average(monkeypatch):
    monkeypatch.setattr(statics, "SHARES", (0.4, 1.0))
    met = {
        (0.4, "fcfs"): (0.6, 0.8, 1.0),
        (1.0, "fcfs"): (0.79, 0.8, 0.8),
        (1.0, "spf"): (0.9,) * 3,
    }
    setup = SimpleNamespace(targets=SloTargets(attainment=0.8))
    subject = Attains(parse("predictive+spf"), met, setup, rates=[])
    found = statics.against_statics(subject, {0: 9.8, 1: 9.8, 2: 9.8})
    assert found["better"] == [
        "static:0.4,0.4",
        "static:0.4,0.4+idle",
        "static:0.4,1+spf",
        "static:0.4,1+idle+spf",
        "static:1,0.4",
        "static:1,0.4+idle",
        "static:1,1+spf",
    ]
    assert found["rates"] == pytest.approx({0: 10.0, 1: 10.0, 2: 10.0})
    assert found["attainment"]["predictive+spf"] == pytest.approx(0.9)
    assert found["attainment"]["static:0.4,0.4"] == pytest.approx(0.8)
    assert found["attainment"]["static:1,1"] == pytest.approx(2.39 / 3), "near, so it is told"
    assert found["attainment"]["static:0.4,0.4+spf"] is None
    assert len(subject.rates) == 15 * 3 - 4 * 2, "two seeds of four pairs: no hope"


# ------------------------------------------------------------ servers


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("static:0.8,1", "--scheduling-policy fcfs --prefill-share 0.8 --decode-share 1.0"),
        (
            "static:1,0.2+idle+spf",
            "--scheduling-policy spf --prefill-share 1.0 --decode-share 0.2 --share-ladder 1.0",
        ),
        ("chunked", "--scheduling-policy fcfs --mode chunked"),
        (
            "predictive+spf",
            "--scheduling-policy spf --policy predictive "
            "--decode-share-ladder 0.4,1.0 --prefill-share-ladder 1.0 "
            "--slo-ttft-ms 100.0 --slo-tpot-ms 50.0 --slo-target 0.8 --tuner-profile p.json",
        ),
    ],
)
def test_systems_are_flags_of_a_server(name, flags):
    targets = SloTargets(TARGETS.default, attainment=0.8)
    assert flags_of(parse(name), targets, LADDERS, Path("p.json")) == flags.split()
    serve._parser("serve").parse_args(flags.split())


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("chunked", "--max-num-batched-tokens 64 --max-num-seqs 8 --ageing-tokens-per-s 9.5"),
        ("static:1,1", "--max-num-batched-tokens 64 --max-num-seqs 8 --ageing-tokens-per-s 9.5"),
        ("colocated", "--max-num-batched-tokens 512 --max-num-seqs 8 --ageing-tokens-per-s 9.5"),
    ],
)
def test_limits_of_a_simulation_are_flags_of_a_server(name, flags):
    names = ("chunk_tokens", "whole_tokens", "max_num_seqs", "ageing_tokens_per_s")
    given = limits_of(parse(name), **dict(zip(names, (64, 512, 8, 9.5), strict=True)))
    assert given == flags.split()
    serve._parser("serve").parse_args(given)
    assert limits_of(parse(name), **dict.fromkeys(names)) == []


def test_disaggregation_is_no_single_server():
    with pytest.raises(ConfigError, match="disaggregated"):
        flags_of(parse("disaggregated"), TARGETS, LADDERS, None)


def test_server_outcomes_are_what_clients_saw():
    good = RequestRecord(scheduled_s=0.0, sent_s=1.0, num_prompt_tokens=3, finished_s=2.0)
    good.arrivals += [Arrival(1.5, 1), Arrival(1.7, 2)]
    bad = RequestRecord(
        scheduled_s=0.0, sent_s=1.5, num_prompt_tokens=3, finished_s=5.0, status="UNAVAILABLE"
    )
    run = LoadRun([good, bad], GeneratorHealth(None, None, 0.5))
    found = outcome_of(run, {"prefill": [(0.0, 1.0)], "decode": []}, host_s=0.006)
    assert found.counters["host_ms_per_token"] == pytest.approx(2.0)
    assert found.ttft_s[0] == pytest.approx(0.5)
    assert found.tpot_s[0] == pytest.approx(0.1)
    assert found.served.tolist() == [True, False]
    assert np.isnan(found.ttft_s[1])
    assert found.duration_s == pytest.approx(4.0)
    assert found.attainment(SloTarget()) == 0.5


def test_the_watch_over_shares_survives_that_a_server_does_not_answer(monkeypatch):
    monkeypatch.setattr(live, "_POLL_S", 0.0)
    shares = pb.PhaseShares(current=0.5)
    answers = [
        TimeoutError(),
        UnavailableError(),
        pb.Partition(prefill=shares, decode=shares),
    ]

    class Control:
        def partition(self) -> pb.Partition:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

    async def main():
        found = {"prefill": [], "decode": []}
        watching = asyncio.create_task(live._watch(Control(), found))
        while not (watching.done() or found["decode"]):
            await asyncio.sleep(0.001)
        watching.cancel()
        return {phase: [share for _, share in changes] for phase, changes in found.items()}

    assert asyncio.run(main()) == {"prefill": [0.5], "decode": [0.5]}


def test_servers_need_targets(capsys):
    assert main(["--model", "m"]) == 2
    assert "slo_ttft_ms and slo_tpot_ms" in capsys.readouterr().err


# ------------------------------------------------------------ the command


def test_command_measures_draws_and_draws_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(statics, "SHARES", (1.0,))
    given = ["--num-requests", "30", "--repeat", "1", "--precision", "0.5", "--share-ladder", "1.0"]
    given += ["--length-scale", "0.05", "--slo-ttft-ms", "15"]
    systems = ["--systems", "static:1,1 predictive+spf", "--check-statics"]
    assert main([*given, *systems, "--out", str(tmp_path / "a")]) == 0
    assert "MODELLED, not measured: NVIDIA H100" in capsys.readouterr().out
    result = json.loads((tmp_path / "a/goodput.json").read_text())
    (measured,) = result["loads"]
    assert measured["systems"].keys() == {"static:1,1", "predictive+spf"}
    tried = measured["statics"]["attainment"]
    assert tried.keys() == {"predictive+spf", "static:1,1", "static:1,1+spf"}
    told = f"static:1,1 attains {tried['static:1,1']:.1%}, {OURS} {tried[OURS]:.1%}"
    assert told in (tmp_path / "a/goodput.md").read_text()
    better = measured["statics"]["better"]
    assert better == [name for name in list(tried)[1:] if (tried[name] or 0) >= 0.9]
    for name in ("attainment", "latency"):
        for suffix in ("png", "svg"):
            assert (tmp_path / f"a/sharegpt-{name}.{suffix}").stat().st_size > 1000
    assert not (tmp_path / "a/sharegpt-shares.svg").exists(), "they did not move"
    measured["systems"]["predictive+spf"]["shares"]["decode"][5:9] = [0.4] * 4
    at_goodput = measured["systems"]["static:1,1"]["seeds"][0]["at_goodput"]
    at_goodput["counters"]["host_ms_per_token"] = 0.75
    (tmp_path / "moved.json").write_text(json.dumps(result))
    assert main(["--from", str(tmp_path / "moved.json"), "--out", str(tmp_path / "b")]) == 0
    for suffix in ("png", "svg"):
        assert (tmp_path / f"b/sharegpt-shares.{suffix}").stat().st_size > 1000
    same = (tmp_path / side / "sharegpt-latency.svg" for side in "ab")
    assert len({path.read_bytes() for path in same}) == 1
    before, after = ((tmp_path / side / "goodput.md").read_text() for side in "ab")
    host = "sharegpt: CPU time beside the steps, ms per token: static:1,1 0.75\n"
    assert after == before + host


def test_loads_of_several_files_keep_how_they_were_measured(tmp_path, capsys):
    given = ["--systems", "colocated", "--repeat", "1", "--precision", "0.5", "--no-plots"]
    given += ["--length-scale", "0.02", "--slo-ttft-ms", "15"]
    for name, num in (("longbench", 20), ("sharegpt", 30)):
        out = ["--num-requests", str(num), "--out", str(tmp_path / name)]
        assert main([*given, "--workload", name, *out]) == 0
    saved = [tmp_path / name / "goodput.json" for name in ("longbench", "sharegpt")]
    old = json.loads(saved[0].read_text())
    (load,) = old["loads"]
    saved[0].write_text(json.dumps(load.pop("run") | {"loads": [load]}))  # once for all loads
    capsys.readouterr()
    files = [word for path in saved for word in ("--from", str(path))]
    assert main([*files, "--out", str(tmp_path / "both"), "--no-plots"]) == 0
    both = json.loads((tmp_path / "both/goodput.json").read_text())
    runs = {one["workload"]: one["run"] for one in both["loads"]}
    assert [runs[name]["settings"]["num_requests"] for name in runs] == [20, 30]
    assert both.keys() == {"loads"}
    lines = [line for line in capsys.readouterr().out.splitlines() if "searches" in line]
    assert ["--num-requests 20" in lines[0], "--num-requests 30" in lines[1]] == [True, True]
    assert all("--repeat 1" in line and "--out" not in line for line in lines)


def test_a_simulation_takes_the_host_s_time_from_the_measurement_beside_it(tmp_path, capsys):
    given = ["--num-requests", "30", "--repeat", "1", "--precision", "0.5", "--share-ladder", "1.0"]
    given += ["--length-scale", "0.05", "--slo-ttft-ms", "15", "--systems", "colocated chunked"]
    assert main([*given, "--out", str(tmp_path / "a"), "--no-plots"]) == 0
    saved = tmp_path / "a/goodput.json"
    result = json.loads(saved.read_text())
    at_goodput = result["loads"][0]["systems"]["chunked"]["seeds"][0]["at_goodput"]
    at_goodput["counters"]["host_ms_per_token"] = 20.0
    saved.write_text(json.dumps(result))
    capsys.readouterr()
    assert main([*given, "--against", str(saved)]) == 0
    found = differences(capsys.readouterr().out)
    assert found["colocated"] == 0 > found["chunked"]
    assert main([*given, "--against", str(saved), "--host-ms", "0"]) == 0
    assert differences(capsys.readouterr().out) == {"colocated": 0, "chunked": 0}


def test_statics_are_judged_like_ours(tmp_path, monkeypatch):
    given = ["--num-requests", "30", "--repeat", "1", "--precision", "0.5", "--share-ladder", "1.0"]
    given += ["--length-scale", "0.05", "--slo-ttft-ms", "15", "--no-plots"]
    given += ["--systems", "colocated predictive+spf"]
    assert main([*given, "--out", str(tmp_path)]) == 0
    saved = tmp_path / "goodput.json"
    result = json.loads(saved.read_text())
    for name, ms in (("colocated", 9.0), ("predictive+spf", 1.0)):
        at_goodput = result["loads"][0]["systems"][name]["seeds"][0]["at_goodput"]
        at_goodput["counters"]["host_ms_per_token"] = ms
    saved.write_text(json.dumps(result))
    hosts = []
    monkeypatch.setattr(
        goodput, "against_statics", lambda like, _: hosts.append(like.setup.platform.host_s) or {}
    )
    assert main([*given, "--against", str(saved), "--check-statics"]) == 0
    assert hosts == [0.001]


def test_plots_leave_out_what_has_no_value():
    seeds = [
        {"trials": [{"rate": rate, "y": y} for rate, y in trials]}
        for trials in [[(1.0, None)], [(1.0, 5.0), (2.0, 6.0)], [(2.0, 7.0)]]
    ]
    axes = Figure().subplots()
    load = {"systems": {"none": {"seeds": seeds[:1]}, "some": {"seeds": seeds}}}
    plots._by_rate(axes, load, lambda trial: trial["y"])
    lines = [np.array(line.get_xydata()).tolist() for line in axes.get_lines()]
    assert lines == [[[1.0, 5.0], [2.0, 6.0]], [[2.0, 7.0]]]
    assert axes.get_legend_handles_labels()[1] == ["some"]


def differences(text: str) -> dict[str, int]:
    """System → percent, of the table that compares."""
    rows = [line.split("|") for line in text.splitlines() if line.rstrip().endswith("% |")]
    return {row[2].strip(): int(row[-2].strip(" %")) for row in rows}


def test_bad_flags_are_explained(capsys):
    assert main(["--systems", "best"]) == 2
    assert "system is 'best'; allowed: static" in capsys.readouterr().err
    assert main(["--workload", "nothing"]) == 2
    assert (
        "workload is 'nothing'; allowed: sharegpt, longbench, flipping" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--kv-tokens 5", "--kv-tokens is 5; allowed: only with --profile"),
        ("--hop-ms 2", "--hop-ms is 2.0; allowed: only with --profile"),
        ("--profile p.json --sharing normalised", "allowed: only without --profile"),
        ("--profile p.json", "kv_tokens is None; allowed: a number of tokens"),
        ("--timeout 3", "--timeout is 3.0; allowed: only with --model"),
        ("-- --max-num-seqs 3", "allowed: only with --model"),
        ("--model m --noise 0", "--noise is 0.0; allowed: only without --model"),
        ("--model m --hardware h200", "--hardware is 'h200'; allowed: only without --model"),
        ("--model m --slo-factor 10", "--slo-factor is 10.0; allowed: only without --model"),
        ("--model m --check-statics", "--check-statics is True; allowed: only without --model"),
        ("--check-statics --systems colocated", "allowed: predictive+spf, to check statics"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(given, message, capsys):
    assert main(given.split()) == 2
    assert message in capsys.readouterr().err
