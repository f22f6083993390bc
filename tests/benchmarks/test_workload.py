import numpy as np
import pytest

from benchmarks.workload import fixed, replayed
from semipd_jax.simulator.arrivals import poisson
from semipd_jax.simulator.traces import TraceRow


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_gaps_have_the_asked_mean_and_burstiness(burstiness: float) -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)."""
    arrivals = poisson(20_000, rate=5.0, burstiness=burstiness, seed=1)
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrivals_follow_the_seed() -> None:
    first, again, other = (poisson(9, rate=2.0, burstiness=1.0, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert poisson(3, rate=float("inf"), burstiness=1.0, seed=0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (float("nan"), 1.0), (1.0, 0.0)])
def test_impossible_arrivals_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="allowed: above 0"):
        poisson(3, rate=rate, burstiness=burstiness, seed=0)


def test_fixed_lengths() -> None:
    first, again, other = (
        fixed([0.0, 1.5], input_len=40, output_len=7, vocab_size=50, seed=s) for s in (1, 1, 2)
    )
    assert first == again
    assert [(p.arrival_s, len(p.prompt_token_ids), p.output_len) for p in first] == [
        (0.0, 40, 7),
        (1.5, 40, 7),
    ]
    prompts = {p.prompt_token_ids for p in [*first, *other]}
    assert len(prompts) == 4, "prompts differ between requests and between seeds"
    tokens = [t for prompt in prompts for t in prompt]
    assert min(tokens) >= 0
    assert max(tokens) < 50


def test_equal_hashes_become_equal_prefixes() -> None:
    rows = [
        TraceRow(arrival_s=0.0, input_len=25, output_len=2, hash_ids=(7, 8, 9)),
        TraceRow(arrival_s=1.0, input_len=30, output_len=2, hash_ids=(7, 8, 5)),
        TraceRow(arrival_s=2.0, input_len=12, output_len=2),
    ]
    a, b, c = replayed(rows, hash_block_len=10, vocab_size=1000, seed=3)
    assert [len(p.prompt_token_ids) for p in (a, b, c)] == [25, 30, 12]
    assert [p.arrival_s for p in (a, b, c)] == [0.0, 1.0, 2.0]
    assert a.prompt_token_ids[:20] == b.prompt_token_ids[:20]
    assert a.prompt_token_ids[20:] != b.prompt_token_ids[20:25]
    assert a.prompt_token_ids[:10] != a.prompt_token_ids[10:20]
    assert c.prompt_token_ids != a.prompt_token_ids[:12]
    (elsewhere,) = replayed(rows[:1], hash_block_len=10, vocab_size=1000, seed=4)
    assert elsewhere.prompt_token_ids != a.prompt_token_ids
