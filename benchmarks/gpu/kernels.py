"""Are the kernels right, and as fast as they are meant to be? Judges `benchmarks.kernels`."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.gpu.part import Outcome, Setting

_TIMEOUT_S: Final = 590.0
_JUDGED: Final = "kernels_pallas mosaic_gpu"


@dataclass(frozen=True, slots=True)
class Target:
    """Of one case on a Hopper GPU: at least a share of the copy bandwidth or a rate in TFLOP/s, or
    at most a time in us."""

    op: str
    case: str
    kind: Literal["share", "TFLOP/s", "us"]
    limit: float

    def judge(self, row: Mapping[str, Any]) -> tuple[bool, str]:
        """(whether it is met, the finding in words)."""
        value = {
            "share": row["share"],
            "TFLOP/s": row["rate"] / 1e12,
            "us": row["timing"]["median_s"] * 1e6,
        }[self.kind]
        is_met = value <= self.limit if self.kind == "us" else value >= self.limit
        bound = "at most" if self.kind == "us" else "at least"
        return is_met, f"{self.case}: {value:.3g} {self.kind}, {bound} {self.limit:g} wanted"


TARGETS: Final = (
    *(
        Target("paged_decode_attention", case, "share", 0.8)
        for case in ("64 rows of 2k", "256 rows of 512", "16 rows of 8k", "8 rows of 16k")
    ),
    Target("paged_decode_attention", "1 row of 4k", "us", 20.0),
    Target("paged_prefill_attention", "8k tokens", "TFLOP/s", 550.0),
    Target("paged_prefill_attention", "2k tokens after 8k", "TFLOP/s", 480.0),
)


def run(setting: Setting) -> Outcome:
    if setting.is_rehearsal:
        return Outcome(True, ("not rehearsed: python -m benchmarks.kernels --compile-only",))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "benchmarks.kernels", "--json", str(path)]
        done = subprocess.run(command, timeout=_TIMEOUT_S, check=False)
        if not path.exists():
            return Outcome(False, (f"benchmarks.kernels ended with status {done.returncode}",))
        result = json.loads(path.read_text())
    failures, misses = list(wrong_rows(result)), list(missed_targets(result))
    found = failures + misses or ["results right, all targets met"]
    return Outcome(not failures and not misses, tuple(found), result)


def wrong_rows(result: Mapping[str, Any]) -> Iterator[str]:
    """Kernels of ours that failed, are wrong or were not reached."""
    for row in result["rows"]:
        if row["problem"] and row["contender"].startswith("kernels_pallas"):
            yield f"{row['case']}, {row['contender']}: {row['problem']}"


def missed_targets(result: Mapping[str, Any]) -> Iterator[str]:
    """None on other GPUs than those the targets are for."""
    if not any(name in result["device"] for name in ("H100", "H200")):
        return
    rows = {
        (row["op"], row["case"]): row
        for row in result["rows"]
        if row["contender"] == _JUDGED and row["timing"]
    }
    for target in TARGETS:
        if (row := rows.get((target.op, target.case))) is None:
            yield f"{target.case}: not measured"
            continue
        is_met, finding = target.judge(row)
        if not is_met:
            yield finding
