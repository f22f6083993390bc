"""On the machine at hand, by the workers themselves: the engine starts once and stops."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from semipd_jax.config import EngineConfig
from semipd_jax.launch.launcher import Launcher
from semipd_jax.messages import FROM_CACHE, Progress


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """Programs that a worker needed, and those of them that it found in the cache."""

    name: str
    num_programs: int
    num_cached: int


def fill(config: EngineConfig, show: Callable[[str, Progress], object]) -> list[WorkerUse]:
    """Returns when every program of every worker is in the cache.

    Weights are made up: programs do not depend on them.

    Args:
      show: called with (process name, progress) while it goes on, from another thread.

    Raises:
      EngineError: of the kind that kept the engine from starting.
    """
    found: list[WorkerUse] = []

    def on_progress(name: str, progress: Progress) -> None:
        if progress.stage == FROM_CACHE:
            found.append(WorkerUse(name, progress.total, progress.done))
        show(name, progress)

    model = replace(config.model, load_format="dummy")
    launcher = Launcher(replace(config, model=model), on_progress=on_progress)
    try:
        launcher.start()
    finally:
        launcher.stop()
    return found
