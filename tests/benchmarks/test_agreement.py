"""The comparison of simulations with servers, these made of a simulation themselves."""

import json
from pathlib import Path

import pytest

from benchmarks import agreement
from benchmarks.agreement import Pair, main, print_agreement
from tests.modelled_profile import save_profile

LOAD = ["--num-requests", "20", "--length-scale", "0.2", "--precision", "0.3"]
LOAD += ["--start-rate", "50"]
LOAD += ["--slo-ttft-ms", "100", "--slo-tpot-ms", "100", "--max-num-seqs", "8"]


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
        ran.append(
            ("measure", words[words.index("--systems") + 1], words[words.index("--seed") + 1])
        )
        i, end = words.index("--model"), words.index("--")
        given = [*words[:i], "--profile", truth, "--kv-tokens", "4096", *words[i + 2 : end]]
        assert words[end + 1 :] == ["--max-num-seqs", "8"]
        return simulate(given)

    monkeypatch.setattr(agreement.profile, "main", take_profile)
    monkeypatch.setattr(agreement.goodput, "main", search)
    return ran


def test_every_search_is_between_two_profiles_that_are_both_simulated(calls, tmp_path, capsys):
    out = tmp_path / "agreement.json"
    given = ["--model", "m", "--kv-tokens", "4096", "--systems", "chunked", *LOAD]
    given += ["--repeat", "2", "--seed", "3", "--out", str(out), "--", "--max-num-seqs", "8"]
    assert main(given) == 0
    a_profile = ("profile", "--share-ladder", "0.5,1.0", "--max-num-seqs", "8")
    expected = [a_profile]
    for seed in ("3", "4"):
        expected += [("measure", "chunked", seed), a_profile, ("simulate",), ("simulate",)]
    assert calls == expected
    result = json.loads(out.read_text())
    assert len(result["profiles"]) == 3
    for n, pair in enumerate(result["pairs"]):
        same, slow = reversed(pair["simulated"]) if n % 2 else pair["simulated"]
        assert same == pair["measured"] > slow > 0
        assert max(rate for rate, attained in pair["trials"] if attained >= 0.9) == same
    assert "chunked  mean" in capsys.readouterr().out


def test_what_fails_is_told(calls, tmp_path):
    given = ["--model", "m", "--kv-tokens", "4096", "--out", str(tmp_path / "x"), *LOAD]
    with pytest.raises(SystemExit, match=r"status 2 of: .*--slo-target 2"):
        main([*given, "--slo-target", "2", "--", "--max-num-seqs", "8"])


def test_the_mean_over_seeds_is_of_rates(capsys):
    one = Pair("chunked", 0, 1.0, None, (1.0, 2.0), ())
    other = Pair("chunked", 1, 4.0, None, (3.0, 3.0), ())
    print_agreement([one, other])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["chunked", "mean", "2.5", "2", "2.5", "-10%"]
