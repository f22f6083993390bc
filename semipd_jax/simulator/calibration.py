"""What profiling a machine would measure: a latency model fitted to its steps at a few shares."""

from itertools import product
from typing import Final

from semipd_jax.simulator.machine import Machine
from semipd_jax.tuner import profile
from semipd_jax.tuner.latency import Conditions, LatencyModel, Sample
from semipd_jax.tuner.work import Work

SHARES: Final = (0.2, 0.4, 0.7, 1.0)
_PREFILL_TOKENS: Final = (64, 256, 512, 1024, 2048, 4096, 8192)
_CONTEXTS: Final = (0, 2048, 8192)
_DECODE_ROWS: Final = (1, 4, 16, 48, 96, 160, 256, 384)
_DECODE_CONTEXTS: Final = (128, 512, 1024, 2048, 4096)


def prefill_works(max_tokens: int) -> list[Work]:
    return [
        Work("prefill", 1, n, c + n, n * c + n * (n + 1) // 2)
        for n, c in product(_PREFILL_TOKENS, _CONTEXTS)
        if n <= max_tokens
    ]


def decode_works(max_rows: int) -> list[Work]:
    return [
        Work("decode", rows, rows, rows * context, rows * context)
        for rows, context in product(_DECODE_ROWS, _DECODE_CONTEXTS)
        if rows <= max_rows
    ]


def samples(machine: Machine, *, max_tokens: int, max_rows: int) -> list[Sample]:
    """Every step alone and beside a middling step of the other phase, at every pair of shares."""
    prefills, decodes = prefill_works(max_tokens), decode_works(max_rows)
    neighbours = {
        "prefill": machine.load((decodes[len(decodes) // 2],)),
        "decode": machine.load((prefills[len(prefills) // 2],)),
    }
    taken: list[Sample] = []
    for work in (*prefills, *decodes):
        load, neighbour = machine.load((work,)), neighbours[work.phase]
        for share in SHARES:
            taken.append(Sample(work, Conditions(share), machine.alone_s(load, share)))
            for other in SHARES:
                seconds, _ = machine.together_s(load, share, neighbour, other)
                taken.append(Sample(work, Conditions(share, other, 1.0), seconds))
    return taken


def calibrated(
    machine: Machine, *, saturation: float, max_tokens: int, max_rows: int
) -> LatencyModel:
    taken = samples(machine, max_tokens=max_tokens, max_rows=max_rows)
    return profile.fit(taken, saturation=saturation)
