"""When requests arrive: seconds from the start of the run, one per request, ascending."""

import numpy as np


def poisson(num_requests: int, *, rate: float, burstiness: float, seed: int) -> list[float]:
    """A renewal process with gamma-distributed gaps, as in vLLM's benchmark.

    Args:
      rate: mean requests per second; infinity sends everything at once.
      burstiness: shape of the gaps: 1 is a Poisson process, below 1 is burstier, above is smoother.
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate}; allowed: above 0, or inf")
    if not burstiness > 0:
        raise ValueError(f"burstiness is {burstiness}; allowed: above 0")
    if rate == float("inf"):
        return [0.0] * num_requests
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), num_requests)
    return (np.cumsum(gaps) - gaps[0]).tolist() if num_requests else []
