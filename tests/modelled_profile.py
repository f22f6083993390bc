"""A latency profile of no machine in particular."""

from pathlib import Path

from semipd_jax.tuner import profile
from semipd_jax.tuner.profile import Profile, Sizes


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
            "prefill": {"fixed": 1e-3, "weights": 2e-3, "tokens": 2e-2, "pairs": 1e-3}
            | {"contention": 1e-2},
            "decode": {"fixed": 1e-3, "weights": 2e-3, "context": 1e-2, "rows": 1e-2}
            | {"weights_contention": 1e-3, "context_contention": 1e-2},
        },
    )
    path.write_text(profile.to_json(made))
    return str(path)
