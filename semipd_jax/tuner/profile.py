"""Coefficients of the latency model as a file: how they were got, for what, and their fit.

A profile is `measured` on the device it names, or `modelled` from data sheets and publications.
Whatever is computed from a modelled one has to say so.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Literal

import msgspec
import numpy as np
from jaxtyping import Bool, Float64

from semipd_jax.config import require
from semipd_jax.errors import ConfigError
from semipd_jax.messages import MemoryLayout, Phase
from semipd_jax.tuner.latency import CONTENTION, FEATURES, LatencyModel, Padding, Sample

SCHEMA: Final = "semipd.latency/3"
_YIELDINGS: Final = tuple(i / 10 for i in range(11))

_SAME_WEIGHTS: Final = 0.05
_ALIKE: Final = 1e-9

type Source = Literal["modelled", "measured"]


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model's, as it is served: what every step reads."""

    weight_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, layout: MemoryLayout) -> "Sizes":
        kv_bytes = layout.kv_bytes // (layout.num_pages * layout.page_size)
        return cls(weight_bytes=layout.weight_bytes, kv_bytes_per_token=kv_bytes)

    def is_like(self, other: "Sizes") -> bool:
        """Whether steps may take equally long. A few more words in the vocabulary do not matter."""
        difference = abs(self.weight_bytes - other.weight_bytes)
        same_kv = self.kv_bytes_per_token == other.kv_bytes_per_token
        return same_kv and difference <= _SAME_WEIGHTS * self.weight_bytes

    def __str__(self) -> str:
        weights_mib, kv_bytes = self.weight_bytes / 2**20, self.kv_bytes_per_token
        return f"{weights_mib:,.1f} MiB of weights and {kv_bytes:,} bytes of KV per token"


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Attributes:
      notes: where the numbers come from.
      sizes: of the model, None if they are not known.
      rungs: phase → shares at which steps were run, ascending; none if it is modelled.
      saturation: share of the device that reaches the whole memory bandwidth.
      yielding: phase → what the other phase leaves to it, see `latency.effective_share`.
      padding: sizes that steps were padded to, see `latency.Padding`.
      coefficients: phase → name → seconds, see `latency.FEATURES`.
      error: phase → mean relative error of the fit on its own samples.
    """

    schema: str = SCHEMA
    source: Source
    device: str
    model: str
    notes: tuple[str, ...] = ()
    sizes: Sizes | None = None
    rungs: dict[Phase, tuple[float, ...]] = {}
    saturation: float
    yielding: dict[Phase, float]
    padding: dict[Phase, tuple[int, ...]] = {}
    coefficients: dict[Phase, dict[str, float]]
    error: dict[Phase, float] = {}


def from_json(text: str | bytes) -> Profile:
    """Raises ConfigError that names what is wrong."""
    try:
        profile = msgspec.json.decode(text, type=Profile)
    except msgspec.DecodeError as error:
        raise ConfigError(f"this is no latency profile: {error}") from error
    require(profile.schema == SCHEMA, "schema", profile.schema, SCHEMA)
    require(0 < profile.saturation <= 1, "saturation", profile.saturation, "above 0, at most 1")
    for phase, names in FEATURES.items():
        yielding = profile.yielding.get(phase, -1.0)
        require(0 <= yielding <= 1, f"yielding.{phase}", yielding, "0 to 1")
        given = profile.coefficients.get(phase, {})
        missing = ", ".join(names)
        require(given.keys() == names.keys(), f"coefficients.{phase}", sorted(given), missing)
        for name, value in given.items():
            require(0 <= value < float("inf"), f"{phase}.{name}", value, "0 or more")
    for phase, sizes in profile.padding.items():
        is_ascending = all(0 < a < b for a, b in pairwise(sizes)) and all(n > 0 for n in sizes)
        require(is_ascending, f"padding.{phase}", sizes, "ascending numbers above 0")
    return profile


def to_json(profile: Profile) -> str:
    return msgspec.json.format(msgspec.json.encode(profile), indent=2).decode() + "\n"


def model_of(profile: Profile) -> LatencyModel:
    values: dict[Phase, np.ndarray] = {
        phase: np.array([profile.coefficients[phase][name] for name in names])
        for phase, names in FEATURES.items()
    }
    return LatencyModel(values, profile.saturation, profile.yielding, profile.padding)


def fit(
    samples: Sequence[Sample], *, saturation: float, padding: Padding | None = None
) -> LatencyModel:
    """What a step takes alone comes from steps alone, so that no neighbour bends it; `CONTENTION`
    and the best `yielding` of a few from what steps side by side take beyond that. Least squares of
    relative errors, coefficients ≥ 0.

    Raises ValueError if a phase has fewer samples alone than coefficients for them.
    """
    best: dict[Phase, tuple[float, np.ndarray]] = {}
    for phase, names in FEATURES.items():
        own = [s for s in samples if s.work.phase == phase]
        alone = [s for s in own if not s.conditions.overlap]
        together = [s for s in own if s.conditions.overlap]
        slows = np.array([name in CONTENTION for name in names])
        if len(alone) < np.count_nonzero(~slows):
            text = f"{len(alone)} {phase} samples alone; at least {np.count_nonzero(~slows)} are"
            raise ValueError(f"{text} needed")
        coefficients = np.zeros(len(names))
        by_itself = _relative(alone, _empty(phase, saturation, 0.0, padding))[:, ~slows]
        coefficients[~slows] = _non_negative(by_itself, np.ones(len(alone)))
        bases = [_empty(phase, saturation, y, padding) for y in _YIELDINGS]
        fits = [(*_beside(together, base, coefficients, slows), base) for base in bases]
        _, slowdowns, base = min(fits, key=lambda f: f[0])
        coefficients[slows] = slowdowns
        best[phase] = base.yielding[phase], coefficients
    return LatencyModel(
        {phase: coefficients for phase, (_, coefficients) in best.items()},
        saturation,
        {phase: yielding for phase, (yielding, _) in best.items()},
        padding,
    )


def _empty(
    phase: Phase, saturation: float, yielding: float, padding: Padding | None
) -> LatencyModel:
    zeros = np.zeros(len(FEATURES[phase]))
    return LatencyModel({phase: zeros}, saturation, {phase: yielding}, padding)


def _relative(samples: Sequence[Sample], model: LatencyModel) -> Float64[np.ndarray, "n k"]:
    """What the coefficients multiply, in parts of the measured seconds."""
    rows = [model.features(s.work, s.conditions) / s.seconds for s in samples]
    return np.array(rows).reshape(len(rows), -1)


def _beside(
    samples: Sequence[Sample],
    base: LatencyModel,
    alone: Float64[np.ndarray, " k"],
    slows: Bool[np.ndarray, " k"],
) -> tuple[float, Float64[np.ndarray, " c"]]:
    """The error and the coefficients of contention, beside those of steps alone."""
    if not samples:
        return 0.0, np.zeros(np.count_nonzero(slows))
    rows = _relative(samples, base)
    beyond = 1 - rows @ alone
    coefficients = _non_negative(rows[:, slows], beyond)
    return float(np.square(rows[:, slows] @ coefficients - beyond).mean()), coefficients


def mean_error(model: LatencyModel, samples: Sequence[Sample]) -> dict[Phase, float]:
    """Mean of |predicted - measured| / measured, by phase."""
    errors: defaultdict[Phase, list[float]] = defaultdict(list)
    for s in samples:
        errors[s.work.phase].append(abs(model.predict(s.work, s.conditions) / s.seconds - 1))
    return {phase: sum(values) / len(values) for phase, values in errors.items()}


def named(model: LatencyModel) -> dict[Phase, dict[str, float]]:
    return {
        p: dict(zip(names, model.get(p).tolist(), strict=True)) for p, names in FEATURES.items()
    }


def _non_negative(
    rows: Float64[np.ndarray, "n k"], wanted: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " k"]:
    """Coefficients ≥ 0 with rows · coefficients near `wanted`: negative ones are left out, one by
    one. Of columns in proportion to each other the last one counts."""
    scale = np.maximum(np.linalg.norm(rows, axis=0), np.finfo(float).tiny)
    unit = rows / scale
    alike = np.triu(unit.T @ unit > 1 - _ALIKE, k=1)
    columns = np.flatnonzero(~alike.any(axis=1)).tolist()
    while True:
        kept, *_ = np.linalg.lstsq(unit[:, columns], wanted)
        if (kept >= 0).all() or len(columns) == 1:
            break
        del columns[int(kept.argmin())]
    coefficients = np.zeros(rows.shape[1])
    coefficients[columns] = np.maximum(kept / scale[columns], 0.0)
    return coefficients
