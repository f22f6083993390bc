"""What every benchmark's result says about where and how it was measured."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("semipd-jax", "jax", "grpcio", "pyzmq", "msgspec", "numpy", "torch", "transformers")


def header(settings: Mapping[str, Any]) -> dict[str, Any]:
    """First part of a result: date, commit, machine, versions and all settings of the run.

    Files and directories go by their names: where they lay says nothing about the result.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "host": {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": cpu_model(),
            "platform": f"{platform.system()} {platform.machine()}",
            "load_average": os.getloadavg(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "settings": {name: _without_place(value) for name, value in settings.items()},
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=2, default=str) + "\n")


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lowest, median and highest."""
    return min(values), median(values), max(values)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns aligned, the first one left, numbers with sensible digits."""
    cells = [[str(h) for h in header], *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *numbers]))


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _without_place(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_place(one) for one in value]
    is_path = isinstance(value, Path | str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def _commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "unknown" without git."""
    try:
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*args: str) -> str:
    command = ["git", "-C", str(_ROOT), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
