"""Latency models and a profile of no machine in particular."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from semipd_jax.messages import Phase
from semipd_jax.tuner import profile
from semipd_jax.tuner.latency import FEATURES
from semipd_jax.tuner.profile import Profile, Sizes


def named(phase: Phase, **seconds: float) -> dict[str, float]:
    """In the order of FEATURES; what is not named is 0."""
    values = dict.fromkeys(FEATURES[phase], 0.0)
    assert seconds.keys() <= values.keys()
    return values | seconds


def coefficients(phase: Phase, **seconds: float) -> np.ndarray:
    return np.array(list(named(phase, **seconds).values()))


TRUTH: Final[Mapping[Phase, np.ndarray]] = MappingProxyType(
    {
        "prefill": coefficients(
            "prefill", fixed=1e-3, weights=5e-3, tokens=25e-3, pairs=2e-3, contention=4e-3
        ),
        "decode": coefficients(
            "decode",
            fixed=0.5e-3,
            weights=6e-3,
            context=8e-3,
            rows=1e-3,
            weights_contention=1e-3,
            context_contention=2e-3,
        ),
    }
)
"""Coefficients of what a test takes for the device."""


def save_profile(path: Path, sizes: Sizes | None = None) -> str:
    """Of a machine about as fast as this one, on which decode at the lower share takes longer than
    the promise of the test beside prefill, but not alone."""
    made = Profile(
        source="modelled",
        device="made up",
        model="demo",
        sizes=sizes,
        saturation=1.0,
        yielding={"prefill": 0.0, "decode": 0.0},
        coefficients={
            "prefill": named("prefill", fixed=1e-3, weights=2e-3, tokens=2e-2, pairs=1e-3)
            | {"contention": 1e-2},
            "decode": named("decode", fixed=1e-3, weights=2e-3, context=1e-2, rows=1e-2)
            | {"weights_contention": 1e-3, "context_contention": 1e-2},
        },
    )
    path.write_text(profile.to_json(made))
    return str(path)
