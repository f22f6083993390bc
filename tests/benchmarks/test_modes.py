"""The comparison of modes: what is sent, and what is made of the turns."""

import math

import pytest

from benchmarks.metrics import Arrival, RequestRecord
from benchmarks.modes import Mix, Turn, gaps_beside, ratios


def test_every_few_requests_one_is_long_and_seeds_move_arrivals_only():
    mix = Mix(chat=(8, 20), long=(90, 2), period=4)
    first, again, other = (mix.workload(20, seed) for seed in (0, 0, 1))
    lengths = [(row.input_len, row.output_len) for row in first.rows]
    assert lengths == [*[(8, 20)] * 3, (90, 2)] * 5
    assert lengths == [(row.input_len, row.output_len) for row in other.rows]
    assert first == again != other


def record(sent_s: float, *arrivals_s: float) -> RequestRecord:
    arrivals = [Arrival(at_s, 1) for at_s in arrivals_s]
    return RequestRecord(scheduled_s=0.0, sent_s=sent_s, num_prompt_tokens=1, arrivals=arrivals)


def test_gaps_count_that_a_long_prompt_was_beside():
    """One is sent at 2.5 and has its first token at 3.5, another one from 7 to 8."""
    longs = [record(2.5, 3.5, 9.0), record(7.0, 8.0)]
    chats = [record(0.0, 1.0, 2.0, 3.25, 3.45, 4.0, 5.0), record(0.0, 6.0, 7.5), record(0.0, 2.75)]
    assert gaps_beside(chats, longs) == pytest.approx([1.25, 0.2, 0.55, 1.5])


def turn(system, seed, *, itl, ttft, goodput) -> Turn:
    return Turn(
        system=system, seed=seed, alone_ttft_ms=1.0, alone_tpot_ms=1.0,
        itl_p99_ms=itl, ttft_p90_ms=ttft, goodput=goodput, attainment={},
    )  # fmt: skip


def test_ratios_compare_turns_of_one_seed_and_goodput_with_the_best_other():
    turns = [
        turn("semi-pd", 0, itl=10.0, ttft=200.0, goodput=3.0),
        turn("colocated", 0, itl=50.0, ttft=100.0, goodput=1.0),
        turn("chunked", 0, itl=20.0, ttft=300.0, goodput=2.0),
        turn("semi-pd", 1, itl=10.0, ttft=400.0, goodput=3.0),
        turn("colocated", 1, itl=30.0, ttft=200.0, goodput=0.0),
        turn("chunked", 1, itl=40.0, ttft=400.0, goodput=0.0),
    ]
    assert ratios(turns) == {
        "p99 ITL, colocated / semi-pd": [5.0, 3.0],
        "p90 TTFT, colocated / semi-pd": [0.5, 0.5],
        "p99 ITL, chunked / semi-pd": [2.0, 4.0],
        "p90 TTFT, chunked / semi-pd": [1.5, 1.0],
        "goodput, semi-pd / best other": [1.5, math.inf],
    }
