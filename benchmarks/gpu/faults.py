"""Do requests survive that workers are killed under load, and does the device's memory come back?

Here workers die by SIGKILL with work on the device, as the kernel's out-of-memory killer does it;
the engine itself never does that.
"""

import argparse
import asyncio
import subprocess
import sys
from dataclasses import asdict
from typing import Final

from benchmarks import chaos
from benchmarks.gpu.part import Outcome, Setting
from semipd_jax.demo import MODEL_DIR

_SLACK_BYTES: Final = 256 << 20
"""Free memory may differ by this much: a worker's context grows with what it has run."""

_FREE_BYTES: Final = """
import sys
from semipd_jax import cuda_driver
from semipd_jax.shares import mps
mps.abstain(sys.argv[1])
cuda_driver.enter_context(0)
print(cuda_driver.call("cuMemGetInfo")[0])
"""


def run(setting: Setting) -> Outcome:
    args = argparse.Namespace(
        model=str(MODEL_DIR),
        device=setting.platform,
        minutes=0.2 if setting.is_rehearsal else 2.0,
        every=3.0 if setting.is_rehearsal else 5.0,
        requests=8 if setting.is_rehearsal else 24,
        growth_mib=16.0,
        free_bytes=None if setting.is_rehearsal else free_bytes,
    )
    what, wrong = asyncio.run(chaos.chaos(args))
    kills: dict[str, int] = what["kills"]
    if len(kills) < chaos.NUM_WORKERS and not setting.is_rehearsal:
        wrong.append(f"only these workers were killed: {', '.join(kills)}")
    lost = what["lost_device_bytes"]
    if lost > _SLACK_BYTES:
        wrong.append(f"{lost} B of the device did not come back")
    summary = f"{sum(kills.values())} kills, {what['requests']} requests: none lost or different"
    return Outcome(not wrong, tuple(wrong) or (summary,), what | asdict(setting))


def free_bytes() -> int:
    """Of the device, asked by a process that is no client of MPS."""
    command = [sys.executable, "-c", _FREE_BYTES, "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)
