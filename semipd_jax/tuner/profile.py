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

from semipd_jax.config import require
from semipd_jax.errors import ConfigError
from semipd_jax.messages import MemoryLayout, Phase
from semipd_jax.tuner.latency import FEATURES, LatencyModel, Padding, Sample

SCHEMA: Final = "semipd.latency/2"
_YIELDINGS: Final = tuple(i / 10 for i in range(11))

_SAME_WEIGHTS: Final = 0.05

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
    """Least squares of relative errors, coefficients ≥ 0, with the best `yielding` of a few.

    Raises ValueError if a phase has fewer samples than coefficients.
    """
    best: dict[Phase, tuple[float, np.ndarray]] = {}
    for phase, names in FEATURES.items():
        own = [s for s in samples if s.work.phase == phase]
        if len(own) < len(names):
            raise ValueError(f"{len(own)} {phase} samples; at least {len(names)} are needed")
        bases = [_empty(phase, saturation, y, padding) for y in _YIELDINGS]
        fits = [(*_fit(own, base), base.yielding[phase]) for base in bases]
        _, coefficients, yielding = min(fits, key=lambda f: f[0])
        best[phase] = yielding, coefficients
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


def _fit(samples: Sequence[Sample], model: LatencyModel) -> tuple[float, np.ndarray]:
    """The error and the coefficients of one phase, for a model that has none yet."""
    rows = np.array([model.features(s.work, s.conditions) / s.seconds for s in samples])
    coefficients = _non_negative(rows)
    return float(np.square(rows @ coefficients - 1).mean()), coefficients


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


def _non_negative(rows: np.ndarray) -> np.ndarray:
    """Coefficients ≥ 0 with rows · coefficients near 1: negative ones are left out, one by one."""
    columns = list(range(rows.shape[1]))
    while True:
        scale = np.linalg.norm(rows[:, columns], axis=0)
        kept, *_ = np.linalg.lstsq(rows[:, columns] / scale, np.ones(len(rows)))
        if (kept >= 0).all() or len(columns) == 1:
            break
        del columns[int(kept.argmin())]
    coefficients = np.zeros(rows.shape[1])
    coefficients[columns] = np.maximum(kept / scale, 0.0)
    return coefficients
