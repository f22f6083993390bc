"""From shared memory and a model directory to compiled steps."""

from typing import Any

import jax

from semipd_jax.child import Child
from semipd_jax.config import EngineConfig, Lane, Platform
from semipd_jax.errors import StartupError
from semipd_jax.messages import MemoryLayout
from semipd_jax.models import module
from semipd_jax.models.registry import load_spec
from semipd_jax.runtime.buckets import Kind, StepBucket, lane_buckets
from semipd_jax.runtime.cache import enable_cache
from semipd_jax.runtime.compile import CompileCounter
from semipd_jax.runtime.runner import StepRunner
from semipd_jax.runtime.state import SharedState
from semipd_jax.storage.arrays import region_arrays
from semipd_jax.storage.manifest import STATE, WEIGHTS
from semipd_jax.storage.mapping import map_regions


def start_jax(platform: Platform, config: EngineConfig) -> None:
    """Starts the backend that the environment names, on one device.

    Raises StartupError if it does not start.
    """
    jax.config.update("jax_cuda_visible_devices", "0")
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # a plugin that fails leaves no backend at all
        reason = str(error) or "its plugin failed"
        raise StartupError(f"jax does not start on {platform!r}: {reason}") from error
    enable_cache(config.compile_cache_dir, platform)


def build_runner(
    child: Child,
    layout: MemoryLayout,
    lane: Lane,
    *,
    map_timeout_s: float,
    largest_only: bool = False,
) -> tuple[StepRunner, CompileCounter]:
    """Maps the memory and compiles every bucket of the lane, reporting progress.

    Returns the runner and a counter of whatever is compiled from now on.

    Args:
      largest_only: compile no bucket but the largest; for measurements.
    """
    config = child.spec.config
    child.progress("map", 0, 1)
    mapped = map_regions(child.spec.run_dir, child.spec.platform, map_timeout_s)
    spec = load_spec(config.model.path)
    graphdef, expected = module.abstract_params(spec, layout.dtype)
    params = module.nest(region_arrays(mapped[WEIGHTS]))
    _check_params(params, expected)
    state = module.nest(region_arrays(mapped[STATE]))
    layers = [state["layers"][i] for i in range(spec.num_layers)]
    first = -1 if largest_only else 0
    buckets: dict[Kind, tuple[StepBucket, ...]] = {
        kind: of_kind[first:]
        for kind, of_kind in lane_buckets(lane, layout, config.scheduler).items()
    }
    num_programs = sum(map(len, buckets.values()))

    runner = StepRunner(
        graphdef,
        params,
        SharedState(layers=layers, tokens=state["tokens"]),
        buckets,
        platform=child.spec.platform,
        on_progress=lambda done: child.progress("compile", done, num_programs),
    )
    return runner, CompileCounter()


def _check_params(params: module.Params, expected: module.Params) -> None:
    """Raises StartupError if the weights in memory are not the model's."""
    found, wanted = (
        {path: (leaf.shape, leaf.dtype.name) for path, leaf in module.flatten(tree).items()}
        for tree in (params, expected)
    )
    if found != wanted:
        path = min(path for path in found | wanted if found.get(path) != wanted.get(path))
        raise StartupError(
            f"weight {path!r} in shared memory is {_or_absent(found.get(path))}; "
            f"the model has {_or_absent(wanted.get(path))}"
        )


def _or_absent(entry: Any) -> str:
    return "absent" if entry is None else f"{entry[1]} {entry[0]}"
