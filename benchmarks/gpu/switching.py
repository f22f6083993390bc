"""What do running streams notice when shares change every 100 ms for a minute?"""

import asyncio
from dataclasses import asdict
from typing import Any, Final

from benchmarks.gpu.part import Outcome, Setting
from benchmarks.shares import added_p99_ms, estimate
from benchmarks.switching import Streams, every_so_often
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine

_EVERY_S: Final = 0.1
_TARGET_MS: Final = 1.0
"""At a switch, the 99th percentile of a gap between tokens may grow by this much."""


def run(setting: Setting) -> Outcome:
    rungs = (0.5, 1.0) if setting.is_rehearsal else (0.6, 0.8, 1.0)
    seconds = 10.0 if setting.is_rehearsal else 60.0
    changing, staying, num_switches = asyncio.run(_measure(setting, rungs, seconds))
    pause = estimate([(changing, staying)], added_p99_ms, _TARGET_MS)
    found = (
        f"{num_switches} switches between {rungs} in {seconds:.0f} s",
        f"ms added to the 99th percentile of gaps between tokens: {pause}",
    )
    details = {"added_p99_ms": pause.as_json(), "num_switches": num_switches}
    return Outcome(setting.is_rehearsal or pause.is_met, found, details | asdict(setting))


async def _measure(
    setting: Setting, rungs: tuple[float, ...], seconds: float
) -> tuple[list[float], list[float], int]:
    """Gaps with and without changes in seconds, and how often a phase switched."""
    options: dict[str, Any] = {"device": setting.platform, "max_num_seqs": 8}
    async with AsyncEngine(str(MODEL_DIR), share_ladder=rungs, **options) as engine:
        streams = Streams(engine, 4)
        await streams.tokens(50)
        changing, staying = await every_so_often(
            engine, streams, rungs, every_s=_EVERY_S, seconds=seconds
        )
        await streams.stop()
        phases = await engine.partition()
    return changing, staying, phases.prefill.num_switches + phases.decode.num_switches
