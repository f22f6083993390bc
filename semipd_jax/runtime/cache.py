"""Compiled programs on disk, one directory for each kind of device and visible number of SMs.

JAX names an entry by the program (so by model, dtype, bucket, and the text of our kernels), jaxlib,
the plugin, XLA_FLAGS, the compile options and what the plugin says of the device. The name of the
directory adds what the machine code depends on besides: see `fingerprint`.
"""

import hashlib
import json
import os
import platform as host
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import jax

from semipd_jax.config import Platform
from semipd_jax.runtime.cache_dir import cache_root, make_private

_HIT_EVENT: Final = "/jax/compilation_cache/cache_hits"
_MISS_EVENT: Final = "/jax/compilation_cache/cache_misses"
_PACKAGES: Final = re.compile(r"jax|jaxlib|jax-cuda.*|nvidia-.*")
"""Names of packages that take part in compiling or are called by programs."""

_VARIABLES: Final = ("NVIDIA_TF32_OVERRIDE", "MOSAIC_GPU_")
"""Beginnings of the names of environment variables that change machine code or its choice."""


class CacheUse:
    """Counts programs that come from the cache and those that have to be compiled, from now on."""

    def __init__(self) -> None:
        self.num_hits = 0
        self.num_misses = 0
        jax.monitoring.register_event_listener(self._on_event)

    def _on_event(self, event: str, **_: Any) -> None:
        self.num_hits += event == _HIT_EVENT
        self.num_misses += event == _MISS_EVENT


def enable_cache(directory: str | None, platform: Platform) -> Path:
    """Keeps every compiled program under `cache_root(directory)`; returns where.

    The backend must be running. Raises ConfigError if a directory is not private. A damaged entry
    is compiled anew; processes that compile the same program write the same entry.
    """
    path = cache_root(directory) / directory_name(platform, fingerprint(platform))
    make_private(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def fingerprint(platform: Platform) -> dict[str, str]:
    """What machine code depends on besides what JAX looks at: the device as this process sees it
    (its visible SMs follow the share), the host's instruction set, the packages that compile, the
    driver, and settings in the environment.

    On a CPU, shares have programs in common: what is compiled for one core and for two differs in
    nothing but that number (jax 0.11.2).
    """
    device = jax.devices()[0]
    found = {"kind": device.device_kind, "client": device.client.platform_version}
    if platform == "cuda":
        found["sms"] = str(getattr(device, "core_count", ""))
        found["driver"] = _first_line(Path("/proc/driver/nvidia/version"))
    else:
        found["cpu"] = _cpu()
    return found | _packages() | _variables(os.environ)


def directory_name(platform: Platform, parts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return "-".join([platform, *([f"{parts['sms']}sm"] if "sms" in parts else []), digest])


def _packages() -> dict[str, str]:
    names = {dist.name: dist.version for dist in metadata.distributions() if dist.name}
    return {name: version for name, version in names.items() if _PACKAGES.fullmatch(name)}


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_VARIABLES)}


def _cpu() -> str:
    """Architecture and instruction set extensions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{host.machine()} {flags.partition(':')[2].strip()}"


def _first_line(path: Path) -> str:
    try:
        return path.read_text().partition("\n")[0]
    except OSError:
        return ""
