"""Plots of a load's results, as PNG and SVG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from semipd_jax.config import PHASES
from semipd_jax.simulator.report import ORIGINS

_SUFFIXES: Final = ("png", "svg")
_STYLE: Final[Any] = {"svg.fonttype": "none", "svg.hashsalt": "semipd", "font.size": 8}
_PERCENTILES: Final = ("p50", "p90", "p99")


def draw(load: Mapping[str, Any], folder: Path) -> list[Path]:
    """Returns the files."""
    figures = {"attainment": _attainment(load), "latency": _latency(load)}
    if moving := {n: r["shares"] for n, r in load["systems"].items() if _move(r["shares"])}:
        figures["shares"] = _shares(load, moving)
    files: list[Path] = []
    with mpl.rc_context(_STYLE):
        for name, figure in figures.items():
            for suffix in _SUFFIXES:
                files.append(folder / f"{load['workload']}-{name}.{suffix}")
                metadata = {"Date": None} if suffix == "svg" else {}
                figure.savefig(files[-1], metadata=metadata)
    return files


def _attainment(load: Mapping[str, Any]) -> Figure:
    figure, (axes,) = _figure(load, 1, 1)
    _by_rate(axes, load, lambda trial: 100 * trial["attainment"])
    axes.axhline(100 * load["slo"]["attainment"], color="grey", linestyle="--", linewidth=0.8)
    axes.set_ylabel("requests that meet both targets, %")
    axes.legend()
    return figure


def _latency(load: Mapping[str, Any]) -> Figure:
    figure, panels = _figure(load, 2, len(_PERCENTILES))
    for i, metric in enumerate(("ttft_ms", "tpot_ms")):
        for percentile, axes in zip(_PERCENTILES, panels[i * len(_PERCENTILES) :], strict=False):
            _by_rate(axes, load, lambda t, m=metric, p=percentile: (t[m] or {}).get(p))
            if (target := load["slo"][metric]) is not None:
                axes.axhline(target, color="grey", linestyle="--", linewidth=0.8)
            axes.set_yscale("log")
            axes.set_ylabel(f"{metric.removesuffix('_ms').upper()} {percentile}, ms")
    panels[0].legend(fontsize=6)
    return figure


def _move(shares: Mapping[str, Any] | None) -> bool:
    return shares is not None and any(len(set(shares[phase])) > 1 for phase in PHASES)


def _shares(load: Mapping[str, Any], moving: Mapping[str, Any]) -> Figure:
    figure, panels = _figure(load, len(moving), 1)
    for axes, (name, shares) in zip(panels, moving.items(), strict=True):
        for phase in PHASES:
            if shares[phase]:
                axes.step(shares["ends_s"], shares[phase], label=phase, linewidth=0.9, where="pre")
        axes.set_ylim(0, 1.05)
        axes.set_ylabel(name)
        axes.set_xlabel("seconds, at the goodput")
    panels[0].legend()
    return figure


def _figure(load: Mapping[str, Any], rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    with mpl.rc_context(_STYLE):
        size = (max(5.0, 3.2 * columns), max(3.2, 1.6 * rows if columns == 1 else 2.6 * rows))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
    origin = ORIGINS[load["origin"]]
    figure.suptitle(f"{load['workload']}\n{origin}: {load['platform']}", fontsize=8)
    return figure, list(grid.flat)


def _by_rate(axes: Axes, load: Mapping[str, Any], value: Any) -> None:
    """A line of each system through all its trials of each seed, as far as they have a value."""
    for i, (name, result) in enumerate(load["systems"].items()):
        label: str | None = name
        for seed in result["seeds"]:
            points = [(t["rate"], y) for t in seed["trials"] if (y := value(t)) is not None]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, ".-", color=f"C{i}", label=label, linewidth=0.8)
                label = None
    axes.set_xlabel("requests/s and device")
