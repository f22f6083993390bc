"""Does the engine say on the device what it says on the CPU?"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from benchmarks.gpu.part import Outcome, Setting
from semipd_jax.config import Device
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import Engine, Generation

_TOP: Final = 5
_TOLERANCES: Final = {"float32": 0.02, "bfloat16": 0.25}
"""Nats by which the CPU may prefer its own token where the two first differ."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Greedy tokens against the reference's.

    Attributes:
      num_equal: of `num_requests`, those with all tokens the same.
      worst_gap: nats by which the reference prefers its own token where a request first differs,
        at most; infinite if it has the other token not even among its best.
    """

    dtype: str
    num_requests: int
    num_equal: int
    worst_gap: float

    @property
    def is_ok(self) -> bool:
        return self.worst_gap <= _TOLERANCES[self.dtype]

    def __str__(self) -> str:
        return (
            f"{self.dtype}: {self.num_equal} of {self.num_requests} requests have the CPU's "
            f"tokens; where one first differs, the CPU prefers its own by {self.worst_gap:.3g} "
            f"nats at most ({_TOLERANCES[self.dtype]:g} allowed)"
        )


def run(setting: Setting) -> Outcome:
    num_requests = 3 if setting.is_rehearsal else 24
    parities = [_parity(setting, dtype, num_requests) for dtype in _TOLERANCES]
    found = tuple(str(parity) for parity in parities)
    details = {"parity": [asdict(parity) for parity in parities]}
    return Outcome(all(parity.is_ok for parity in parities), found, details)


def _parity(setting: Setting, dtype: str, num_requests: int) -> Parity:
    wanted = _generate("cpu", dtype, num_requests)
    return compare(dtype, wanted, _generate(setting.platform, dtype, num_requests))


def _generate(device: Device, dtype: str, num_requests: int) -> list[Generation]:
    rng = random.Random(0)
    prompts = [
        [rng.randrange(100, 4000) for _ in range(rng.randrange(1, 500))]
        for _ in range(num_requests)
    ]
    with Engine(str(MODEL_DIR), device=device, dtype=dtype, max_num_seqs=8) as engine:
        return engine.generate_many(
            prompts, max_tokens=48, temperature=0.0, ignore_eos=True, logprobs=_TOP
        )


def compare(dtype: str, wanted: Sequence[Generation], found: Sequence[Generation]) -> Parity:
    gaps = [
        gap for a, b in zip(wanted, found, strict=True) if (gap := _first_gap(a, b)) is not None
    ]
    return Parity(dtype, len(wanted), len(wanted) - len(gaps), max(gaps, default=0.0))


def _first_gap(wanted: Generation, found: Generation) -> float | None:
    """Where the tokens first differ: the log-probability of the reference's own less that of the
    other, by the reference. None if they do not differ."""
    for own, token_id in zip(wanted.logprobs, found.token_ids, strict=True):
        if own.token_id != token_id:
            return own.logprob - dict(own.top).get(token_id, float("-inf"))
    return None
