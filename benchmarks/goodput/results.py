"""What was found, as JSON-like values: tables and plots are made of these, also later."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from benchmarks.goodput.bootstrap import mean_interval
from benchmarks.goodput.search import Found
from semipd_jax.simulator.report import summary
from semipd_jax.simulator.run import Outcome
from semipd_jax.tuner.slo import SloTargets

_NUM_BINS: Final = 60


def result_of(found: Sequence[Found], targets: SloTargets) -> dict[str, Any]:
    """Of one subject: goodput in requests per second and device, and everything that was tried."""
    rates = [one.rate for one in found]
    result = {
        "goodput": sum(rates) / len(rates),
        "interval": list(mean_interval(rates)),
        "seeds": [
            {
                "seed": one.seed,
                "goodput": one.rate,
                "at_goodput": summary(one.best, targets),
                "trials": [
                    {"rate": rate, **_in_short(summary(outcome, targets))}
                    for rate, outcome in one.trials.items()
                ],
            }
            for one in found
        ],
        "shares": _shares_over_time(found[0].best),
    }
    return rounded(result)


def _in_short(summarised: Mapping[str, Any]) -> dict[str, Any]:
    """What is drawn."""
    names = ("attainment", "num_failed", "ttft_ms", "tpot_ms")
    return {name: summarised[name] for name in names}


def rounded(value: Any) -> Any:
    """To four digits: no result is better known."""
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list():
            return [rounded(item) for item in value]
    return value


def _shares_over_time(outcome: Outcome) -> dict[str, Any] | None:
    """Mean share of each phase in equal parts of the run; None if it has no shares."""
    if not any(outcome.shares.values()):
        return None
    edges = np.linspace(0.0, outcome.duration_s, _NUM_BINS + 1)
    means = {phase: _means(changes, edges) for phase, changes in outcome.shares.items()}
    return {"ends_s": edges[1:].tolist(), **means}


def _means(changes: Sequence[tuple[float, float]], edges: np.ndarray) -> list[float]:
    """Time-weighted means between edges of a step function; it holds its first value before."""
    if not changes:
        return []
    at = np.array([when for when, _ in changes])
    values = np.array([share for _, share in changes])
    area = np.concatenate([[0.0], np.cumsum(values[:-1] * np.diff(at))])

    def integral(when: np.ndarray) -> np.ndarray:
        index = np.maximum(np.searchsorted(at, when, side="right") - 1, 0)
        return area[index] + values[index] * (when - at[index])

    return (np.diff(integral(edges)) / np.diff(edges)).tolist()


def host_ms(result: Mapping[str, Any]) -> float | None:
    """CPU time beside the steps at a system's goodput, ms per token, if it was measured."""
    counters = [seed["at_goodput"]["counters"] for seed in result["seeds"]]
    values = [c["host_ms_per_token"] for c in counters if "host_ms_per_token" in c]
    return sum(values) / len(values) if values else None


def rates_by_seed(result: Mapping[str, Any]) -> list[float]:
    return [seed["goodput"] for seed in result["seeds"]]
