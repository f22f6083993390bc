"""How long a step takes: T(phase, work, own share, other phase's share and activity).

Roofline terms, linear in coefficients ≥ 0. With s the effective share, b = min(1, s / saturation)
the reachable fraction of the memory bandwidth, and a = 1 while the other phase runs (else 0):

  prefill  fixed + (weights + context · c + reads · m + activations · n) / b +
           (products + tokens · n + pairs · m) / s + a · contention · n / s
  decode   fixed + weights / b + context · c / b + (products + batched · [n > 1] + rows · n) / s +
           a · (weights_contention + context_contention · c) / b

where n counts query tokens, m pairs of query and key, c context tokens (`tuner.work`). Programs
have fixed shapes, so n is the size that a step is padded to (`Padding`); padding reads no context.
Attention computes pairs, reads each key once, and again for every block of queries. `products` are
those of every step, however small. One row's products are of a matrix and a vector, those of more
are of matrices, by other code: on a CPU two rows cost nearly twice as much as one, and eight hardly
more than four.

The effective share is the worker's own as long as both shares fit on the device. Beyond that it is
at least own / (own + other), "the two phases share 100%" (semi-PD, arXiv 2504.19867, section 5),
and at most its own, if the other phase waits for memory and leaves it the arithmetic: `yielding`
says how far in between, and is measured. Bandwidth saturates at a fraction of the SMs (Bullet,
arXiv 2504.19516: about 30 of 108 on an A100; DuetServe, arXiv 2511.04791: a fifth of an H100's
reaches about 60 %). Every term falls with the own share and grows with the other's, so more share
never predicts slower.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float64

from semipd_jax.messages import Phase
from semipd_jax.tuner.work import Work

FEATURES: Final[Mapping[Phase, Mapping[str, float]]] = {
    "prefill": {
        "fixed": 1,
        "products": 1,
        "weights": 1,
        "context": 1e5,
        "reads": 1e6,
        "activations": 1e3,
        "tokens": 1e3,
        "pairs": 1e6,
        "contention": 1e3,
    },
    "decode": {
        "fixed": 1,
        "products": 1,
        "weights": 1,
        "context": 1e5,
        "batched": 1,
        "rows": 1e2,
        "weights_contention": 1,
        "context_contention": 1e5,
    },
}
"""Coefficient → the amount that it is the seconds of. A fit counts what it cannot tell apart, such
as all constants if there is one share, as the last of these: as reading the weights, or else as
arithmetic."""

CONTENTION: Final = frozenset(("contention", "weights_contention", "context_contention"))
"""Coefficients of what a running neighbour adds."""


type Padding = Mapping[Phase, Sequence[int]]
"""Phase → sizes that steps are padded to, ascending. What is larger than all of them is not padded,
nor is a phase that is not there."""


def effective_share(own: float, other: float, yielding: float = 0.0) -> float:
    """What a phase gets of the device beside a running phase of share `other` (0: it is idle).

    `yielding` is how much of what does not fit the other phase leaves to it, 0 to 1.
    """
    if own + other <= 1:
        return own
    normalised = own / (own + other)
    return normalised + yielding * (own - normalised)


@dataclass(frozen=True, slots=True)
class Terms:
    """One step's time as a function of shares: seconds at b = 1 and s = 1.

    Attributes:
      memory, compute: what scales with 1 / b and 1 / s.
      memory_contention, compute_contention: what is added to them while the other phase runs.
      saturation, yielding: see `LatencyModel`.
    """

    fixed: float
    memory: float
    compute: float
    memory_contention: float
    compute_contention: float
    saturation: float
    yielding: float

    def at(self, own: float, other: float) -> float:
        """Seconds under the share `own`, all the while beside a phase of `other` (0: idle)."""
        share = effective_share(own, other, self.yielding)
        memory, compute = self.memory, self.compute
        if other > 0:
            memory += self.memory_contention
            compute += self.compute_contention
        return self.fixed + memory / min(1.0, share / self.saturation) + compute / share


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which a step ran.

    Attributes:
      share: its worker's.
      other_share: that of the other phase, while it ran.
      overlap: part of the step's time during which the other phase ran, 0 to 1.
    """

    share: float
    other_share: float = 0.0
    overlap: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A step that was run."""

    work: Work
    conditions: Conditions
    seconds: float


class LatencyModel:
    """
    Args:
      coefficients: of each phase, in the order of FEATURES, ≥ 0.
      saturation: share of the device that reaches the whole memory bandwidth.
      yielding: what is left to each phase of what does not fit, see `effective_share`.
      padding: of prefill's query tokens and decode's rows.
    """

    def __init__(
        self,
        coefficients: Mapping[Phase, Float64[np.ndarray, " k"]],
        saturation: float,
        yielding: Mapping[Phase, float],
        padding: Padding | None = None,
    ) -> None:
        self.saturation = saturation
        self.yielding = dict(yielding)
        self.padding = padding or {}
        self._coefficients: dict[Phase, list[float]] = {}
        for phase, values in coefficients.items():
            self.set(phase, values)

    def set(self, phase: Phase, coefficients: Float64[np.ndarray, " k"]) -> None:
        self._coefficients[phase] = coefficients.tolist()

    def get(self, phase: Phase) -> Float64[np.ndarray, " k"]:
        return np.array(self._coefficients[phase])

    def terms(self, work: Work) -> Terms:
        contexts = work.context_tokens / 1e5
        if work.phase == "prefill":
            (
                fixed, products, weights, context, reads, activations, tokens, pairs, contention
            ) = self._coefficients["prefill"]  # fmt: skip
            num_tokens = self._padded("prefill", work.num_tokens) / 1e3
            num_pairs = work.num_pairs / 1e6
            return Terms(
                fixed,
                weights + context * contexts + reads * num_pairs + activations * num_tokens,
                products + tokens * num_tokens + pairs * num_pairs,
                0.0,
                contention * num_tokens,
                self.saturation,
                self.yielding["prefill"],
            )
        (
            fixed, products, weights, context, batched, rows, weights_slowed, context_slowed
        ) = self._coefficients["decode"]  # fmt: skip
        num_rows = self._padded("decode", work.num_rows)
        return Terms(
            fixed,
            weights + context * contexts,
            products + batched * (num_rows > 1) + rows * num_rows / 1e2,
            weights_slowed + context_slowed * contexts,
            0.0,
            self.saturation,
            self.yielding["decode"],
        )

    def least(self, phase: Phase) -> Terms:
        """Of any step, however small; of decode's, any that has more than one row."""
        fixed, products, weights, *others = self._coefficients[phase]
        if phase == "decode":
            _, batched, *_ = others
            products += batched
        yielding = self.yielding[phase]
        return Terms(fixed, weights, products, 0.0, 0.0, self.saturation, yielding)

    def predict(self, work: Work, conditions: Conditions) -> float:
        """Seconds of a step."""
        terms, own, part = self.terms(work), conditions.share, conditions.overlap
        return part * terms.at(own, conditions.other_share) + (1 - part) * terms.at(own, 0.0)

    def features(self, work: Work, conditions: Conditions) -> Float64[np.ndarray, " k"]:
        """What the coefficients multiply. Time alone and time beside the other phase are mixed."""
        own, other, part = conditions.share, conditions.other_share, conditions.overlap
        share = effective_share(own, other, self.yielding[work.phase])
        together = self._features(work, share, 1.0)
        return part * together + (1 - part) * self._features(work, own, 0.0)

    def _features(self, work: Work, share: float, active: float) -> Float64[np.ndarray, " k"]:
        per_compute, per_memory = 1 / share, 1 / min(1.0, share / self.saturation)
        contexts = work.context_tokens / 1e5
        if work.phase == "prefill":
            tokens = self._padded("prefill", work.num_tokens) / 1e3
            pairs = work.num_pairs / 1e6
            return np.array(
                [
                    1.0,
                    per_compute,
                    per_memory,
                    contexts * per_memory,
                    pairs * per_memory,
                    tokens * per_memory,
                    tokens * per_compute,
                    pairs * per_compute,
                    active * tokens * per_compute,
                ]
            )
        rows = self._padded("decode", work.num_rows)
        return np.array(
            [
                1.0,
                per_compute,
                per_memory,
                contexts * per_memory,
                (rows > 1) * per_compute,
                rows / 1e2 * per_compute,
                active * per_memory,
                active * contexts * per_memory,
            ]
        )

    def _padded(self, phase: Phase, size: int) -> int:
        sizes = self.padding.get(phase, ())
        i = bisect_left(sizes, size)
        return sizes[i] if size > 0 and i < len(sizes) else size
