"""The comparison of simulations with servers, these made of a simulation themselves."""

import json
import re
from pathlib import Path

import pytest
from modelled_profile import save_profile

from benchmarks import agreement
from benchmarks.agreement import Search, main, print_agreement

LOAD = ["--num-requests", "20", "--length-scale", "0.2", "--precision", "0.3"]
LOAD += ["--slo-ttft-ms", "100", "--slo-tpot-ms", "100", "--max-num-seqs", "8"]
LOAD += ["--start-rate", "50"]
GIVEN = ["--model", "m", "--kv-tokens", "4096", "--systems", "chunked", *LOAD]
SERVER = ["--", "--max-num-seqs", "8"]
HOST_MS = 0.25


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What is run, in order. Servers are simulated with a profile; of the profiles that are taken,
    every second one is of a machine twice as slow."""
    ran: list[tuple[str, ...]] = []
    simulate = agreement.goodput.main
    truth = save_profile(tmp_path / "truth.json")

    def take_profile(words):
        path = Path(words[words.index("--output") + 1])
        ran.append(("profile", *words[words.index("--share-ladder") :]))
        save_profile(path)
        if sum(call[0] == "profile" for call in ran) % 2 == 0:
            made = json.loads(path.read_text())
            for phase in made["coefficients"].values():
                phase.update({name: 2 * seconds for name, seconds in phase.items()})
            path.write_text(json.dumps(made))
        return 0

    def search(words):
        if "--model" not in words:
            ran.append(("simulate",))
            return simulate(words)
        at, end = words.index("--model"), words.index("--")
        assert words[end:] == SERVER
        ran.append(("measure", *(words[words.index(f) + 1] for f in ("--systems", "--seed"))))
        device = ["--profile", truth, "--kv-tokens", "4096", "--host-ms", str(HOST_MS)]
        status = simulate([*words[:at], *device, *words[at + 2 : end]])
        saved = Path(words[words.index("--out") + 1]) / "goodput.json"
        result = json.loads(saved.read_text())
        (seed,) = result["loads"][0]["systems"]["chunked"]["seeds"]
        seed["at_goodput"]["counters"]["host_ms_per_token"] = HOST_MS
        saved.write_text(json.dumps(result))
        return status

    monkeypatch.setattr(agreement.profile, "main", take_profile)
    monkeypatch.setattr(agreement.goodput, "main", search)
    return ran


def test_every_search_is_between_two_profiles_and_simulated_with_both(calls, tmp_path, capsys):
    out = tmp_path / "agreement.json"
    assert main([*GIVEN, "--repeat", "2", "--seed", "3", "--out", str(out), *SERVER]) == 0
    a_profile = ("profile", "--share-ladder", "0.5,1.0", "--max-num-seqs", "8")
    measured = [("measure", "chunked", "3"), a_profile, ("measure", "chunked", "4"), a_profile]
    assert calls == [a_profile, *measured, *[("simulate",)] * 4]
    result = json.loads(out.read_text())
    assert len(result["profiles"]) == 3
    for n, search in enumerate(result["searches"]):
        same, slow = reversed(search["simulated"]) if n % 2 else search["simulated"]
        assert same == search["measured"] > slow > 0
        assert max(rate for rate, attained in search["trials"] if attained >= 0.9) == same
    first = capsys.readouterr().out
    calls.clear()
    assert main(["--from", str(out), "--out", str(out)]) == 0
    assert calls == [("simulate",)] * 4
    assert json.loads(out.read_text()) == result
    assert capsys.readouterr().out == first


def test_what_was_measured_is_kept_when_something_fails(calls, tmp_path, monkeypatch):
    out, take_profile = tmp_path / "agreement.json", agreement.profile.main
    monkeypatch.setattr(
        agreement.profile, "main", lambda words: 1 if len(calls) == 4 else take_profile(words)
    )
    with pytest.raises(SystemExit, match=r"status 1 of: --model m --output"):
        main([*GIVEN, "--repeat", "2", "--out", str(out), *SERVER])
    result = json.loads(out.read_text())
    assert [search["seed"] for search in result["searches"]] == [0]
    assert len(result["profiles"]) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out", "/nowhere/x"], r"out is '/nowhere/x'"),
        (["--out", "/tmp"], r"out is '/tmp'"),
        (["--kv-tokens", "9", "--out", "x"], "model is None"),
        (["--model", "m", "--out", "x"], "kv_tokens is None"),
        (["--from", "x", "--out", "x", "--num-requests", "9"], "flags is .*--num-requests"),
        (["--from", "/nowhere/x", "--out", "x"], "No such file"),
    ],
)
def test_flags_that_cannot_work_are_refused(calls, words, named, capsys):
    assert main(words) == 2
    assert re.search(named, capsys.readouterr().err)
    assert not calls


def test_means_are_of_rates_and_differences_have_no_sign(capsys):
    one = Search("chunked", 0, 1.0, 0.0, (), (1.0, 2.0))
    other = Search("chunked", 1, 4.0, 0.0, (), (3.0, 3.0))
    print_agreement([one, other])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["chunked", "2.5", "2.25", "-10%", "38%"]
