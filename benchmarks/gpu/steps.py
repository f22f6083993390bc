"""Step times of a model on every share, beside the least time that the device's data sheet allows.

The engine starts as always, with `steps_worker` in place of its workers.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.aot.programs import LLAMA_8B
from benchmarks.gpu.part import Outcome, Setting
from benchmarks.gpu.steps_worker import result_path
from semipd_jax.config import EngineConfig
from semipd_jax.demo import MODEL_DIR
from semipd_jax.launch.launcher import Launcher, Modules
from semipd_jax.messages import Phase
from semipd_jax.models.registry import load_spec
from semipd_jax.models.spec import ModelSpec
from semipd_jax.options import build_config
from semipd_jax.tuner.work import Work

_STARTUP_S: Final = 560.0
_PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Peak:
    """NVIDIA's data sheets, SXM: bytes per second of memory, dense bfloat16 FLOP per second."""

    bytes_per_s: float
    flop_per_s: float


PEAKS: Final[Mapping[str, Peak]] = {
    "H200": Peak(4.8e12, 989e12),
    "H100": Peak(3.35e12, 989e12),
    "A100": Peak(2.039e12, 312e12),
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """`floor_s` is None on a device that is not in the table."""

    phase: Phase
    share: float
    grant: str
    step_s: float
    floor_s: float | None
    num_compiles: int

    def __str__(self) -> str:
        floor = "" if self.floor_s is None else f", {self.step_s / self.floor_s:.2f}x the floor"
        return f"{self.phase} at {self.share:g}: {1e3 * self.step_s:.2f} ms{floor} ({self.grant})"


def run(setting: Setting) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="semipd-") as folder:
        times = measure(_config(setting, Path(folder)), setting.name)
    wrong = faults(times)
    details = {"steps": [asdict(time) for time in times]}
    return Outcome(not wrong, (*map(str, times), *wrong), details)


def _config(setting: Setting, folder: Path) -> EngineConfig:
    """An 8B model in bfloat16 with random weights; in a rehearsal, the demo model."""
    if setting.is_rehearsal:
        return build_config(
            str(MODEL_DIR), device="cpu", max_num_seqs=4, max_num_batched_tokens=64,
            max_model_len=256, share_ladder=(0.5,), startup_timeout=_STARTUP_S,
        )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return build_config(
        str(folder), device="cuda", dtype="bfloat16", load_format="dummy", max_num_seqs=64,
        max_num_batched_tokens=2048, max_model_len=4096, share_ladder=(0.4, 0.6, 0.8),
        mps="on", startup_timeout=_STARTUP_S,
    )  # fmt: skip


def measure(config: EngineConfig, device: str) -> list[StepTime]:
    """Every rung of both phases. Raises EngineError if the engine does not start."""
    launcher = Launcher(config, modules=Modules(worker="benchmarks.gpu.steps_worker"))
    try:
        launcher.start()
        rungs = [(phase, share) for phase in _PHASES for share in config.shares.rungs(phase)]
        results = [
            json.loads(result_path(launcher.run_dir, phase, share).read_text())
            for phase, share in rungs
        ]
    finally:
        launcher.stop()
    spec = load_spec(config.model.path)
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    return [_step_time(result, spec, peak) for result in results]


def _step_time(result: Mapping[str, Any], spec: ModelSpec, peak: Peak | None) -> StepTime:
    work = Work(**result["work"])
    floor = None
    if peak is not None:
        floor = floor_s(spec, work, result["kv_bytes_per_token"], result["share"], peak)
    return StepTime(
        phase=work.phase,
        share=result["share"],
        grant=result["grant"],
        step_s=result["step_s"],
        floor_s=floor,
        num_compiles=result["num_compiles"],
    )


def floor_s(
    spec: ModelSpec, work: Work, kv_bytes_per_token: int, share: float, peak: Peak
) -> float:
    """Seconds that a step takes at least: all weights but the embedding and the KV that attention
    sees are read once from memory, at full bandwidth; every token is multiplied with every matrix
    of the layers, on a share of the tensor cores. Attention's own FLOPs are left out."""
    inner = sum(math.prod(w.shape) for w in spec.weights if spec.vocab_size not in w.shape)
    heads = [math.prod(w.shape) for w in spec.weights if spec.vocab_size in w.shape]
    num_bytes = 2 * (inner + min(heads)) + kv_bytes_per_token * work.context_tokens
    flop = 2 * inner * work.num_tokens
    return max(num_bytes / peak.bytes_per_s, flop / (share * peak.flop_per_s))


def faults(times: Sequence[StepTime]) -> list[str]:
    """What cannot be: a step faster than its floor, or one that compiled something."""
    found = [f"compiled while it was timed: {time}" for time in times if time.num_compiles]
    return found + [
        f"faster than its floor, so not what was meant: {time}"
        for time in times
        if time.floor_s is not None and time.step_s < time.floor_s
    ]
