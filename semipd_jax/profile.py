"""`python -m semipd_jax.profile`: how long steps take on this machine, for `--tuner-profile`.

Starts the engine's own processes with a worker for each share of the ladder, and runs steps of
made-up requests on them: every shape at every share alone, then prefill beside decode at every pair
of shares. Takes a few minutes; nothing else should run on the device meanwhile.
"""

import argparse
import os
import queue
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from semipd_jax import logs, options
from semipd_jax.config import PHASES, EngineConfig, require
from semipd_jax.coordinator import profiling
from semipd_jax.demo import MODEL_DIR
from semipd_jax.errors import ConfigError, EngineError
from semipd_jax.launch import waits
from semipd_jax.launch.launcher import Launcher, Modules
from semipd_jax.messages import MemoryLayout, Progress
from semipd_jax.runtime.buckets import padded_sizes
from semipd_jax.tuner import profile
from semipd_jax.tuner.latency import LatencyModel, Sample
from semipd_jax.tuner.profile import Profile, Sizes
from semipd_jax.tuner.setup import ladders_of

_SATURATIONS: Final = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""The first one that fits best counts: what the ladder cannot tell apart, as all that is below its
smallest share, is taken for the most that it can be."""
_BAR: Final = 30
_LINES: Final = 10  # where there is no terminal


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m semipd_jax.profile") -> int:
    """Returns the exit status: 0, 1 after a failure, 2 for a bad command line."""
    args = vars(_parser(prog).parse_args(argv))
    output: Path = args.pop("output")
    try:
        config = options.build_config(**args)
        ladders_of(config.shares)
        is_writable = os.access(output.parent, os.W_OK) and not output.is_dir()
        require(is_writable, "output", str(output), "a file in a directory that can be written to")
    except ConfigError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    logs.configure("profile", config.log_level, config.log_format)
    try:
        made = measure(config, _Bar())
    except (EngineError, ValueError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    output.write_text(profile.to_json(made))
    errors = ", ".join(f"{phase} {error:.1%}" for phase, error in made.error.items())
    print(f"{output}: {made.device}, {made.model}; mean error of the fit: {errors}")
    return 0


def measure(config: EngineConfig, on_progress: "_Bar") -> Profile:
    """Raises the EngineError that prevented it, or ValueError: the model's longest request is so
    short that steps cannot be told apart."""
    told: queue.SimpleQueue[EngineError | None] = queue.SimpleQueue()

    def take(name: str, progress: Progress) -> None:
        on_progress(name, progress)
        if progress.stage == profiling.STAGE and progress.done == progress.total:
            told.put(None)

    launcher = Launcher(
        config,
        modules=Modules(coordinator="semipd_jax.coordinator.profiling"),
        on_failure=told.put,
        on_progress=take,
    )
    try:
        layout = launcher.start()
        if (error := waits.take(told)) is not None:
            raise error
        encoded = (Path(launcher.run_dir) / profiling.SAMPLES_FILE).read_bytes()
        device = launcher.device_name
    finally:
        launcher.stop()
    samples = msgspec.json.decode(encoded, type=list[Sample])
    return fitted(samples, config, device, layout)


def fitted(
    samples: Sequence[Sample], config: EngineConfig, device: str, layout: MemoryLayout
) -> Profile:
    """The profile that fits best. Raises ValueError if there are too few samples to tell."""

    def error(model: LatencyModel) -> float:
        return sum(profile.mean_error(model, samples).values())

    padding = padded_sizes(layout, config.scheduler)
    fits = (profile.fit(samples, saturation=s, padding=padding) for s in _SATURATIONS)
    model = min(fits, key=error)
    return Profile(
        source="measured",
        device=device,
        model=config.model.name,
        notes=(f"{datetime.now(UTC):%Y-%m-%d}: {len(samples)} kinds of steps",),
        rungs={phase: config.shares.rungs(phase) for phase in PHASES},
        sizes=Sizes.of(layout),
        saturation=model.saturation,
        yielding=model.yielding,
        padding=padding,
        coefficients=profile.named(model),
        error=profile.mean_error(model, samples),
    )


class _Bar:
    """Shows how far it is: on a terminal in one line, else now and then in a new one."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown = -1
        self._started_s = time.monotonic()

    def __call__(self, name: str, progress: Progress) -> None:
        if progress.stage != profiling.STAGE:
            self._line(f"{name}: {progress.stage} {progress.done}/{progress.total}", ends=False)
            return
        done, total = progress.done, progress.total
        if self._is_terminal:
            filled = "#" * (_BAR * done // total)
            text = f"[{filled:<{_BAR}}] {done}/{total} {progress.detail}"
            self._line(text, ends=done == total)
        elif _LINES * done // total != self._shown:
            self._shown = _LINES * done // total
            seconds = time.monotonic() - self._started_s
            print(f"{done}/{total} after {seconds:.0f} s", file=sys.stderr, flush=True)

    def _line(self, text: str, *, ends: bool) -> None:
        if self._is_terminal:
            print(f"\r{text[:110]:<110}", end="\n" if ends else "", file=sys.stderr, flush=True)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").partition("\n\n")[2],
        epilog="All options of the engine are taken too: give those that you serve with.",
    )
    parser.add_argument("--model", default=str(MODEL_DIR), help="model directory")
    parser.add_argument(
        "--output", type=Path, default=Path("profile.json"), help="file to write [profile.json]"
    )
    options.add_flags(parser, options.OPTIONS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
