"""What an engine is simulated on: a machine and the sizes and times around it."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Final

from semipd_jax.simulator.calibration import calibrated
from semipd_jax.simulator.hardware import Hardware
from semipd_jax.simulator.link import Link
from semipd_jax.simulator.machine import Machine
from semipd_jax.simulator.profiled import Profiled
from semipd_jax.simulator.roofline import Roofline, Sharing
from semipd_jax.tuner.latency import LatencyModel
from semipd_jax.tuner.profile import Profile, Source, model_of

_GPU_PAGE_SIZE: Final = 64
_MAX_TOKENS: Final = 8192
_MAX_ROWS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """
    Attributes:
      source: `modelled` if its numbers were not measured on the device.
      kv_tokens: number of worker processes → tokens that fit in the pool.
      hop_s: from the end of a step to the start of the next one, if that was not sent ahead.
      host_s: what each token costs the device beside its steps, see `Device`: 0 on a GPU.
      predictor: makes a latency model for a tuner to start from.
      link: to a second device; None if there is none.
    """

    name: str
    source: Source
    notes: tuple[str, ...]
    machine: Machine
    page_size: int
    kv_tokens: Callable[[int], int]
    hop_s: float
    predictor: Callable[[], LatencyModel]
    link: Link | None = None
    host_s: float = 0.0


def modelled(hardware: Hardware, sharing: Sharing) -> Platform:
    machine, device = Roofline(hardware, sharing), hardware.device

    @cache
    def fitted() -> LatencyModel:
        limits = {"max_tokens": _MAX_TOKENS, "max_rows": _MAX_ROWS}
        return calibrated(machine, saturation=device.saturation, **limits)

    return Platform(
        name=f"{device.name}, {hardware.shape.name}, shares {sharing}",
        source=hardware.source,
        notes=hardware.notes,
        machine=machine,
        page_size=_GPU_PAGE_SIZE,
        kv_tokens=lambda num_processes: hardware.kv_tokens(num_processes=num_processes),
        hop_s=device.hop_s,
        predictor=lambda: deepcopy(fitted()),
        link=Link(device.link_bytes_per_s, device.hop_s, hardware.shape.kv_bytes_per_token),
    )


def profiled(
    profile: Profile, *, kv_tokens: int, page_size: int, hop_s: float, host_s: float
) -> Platform:
    """A device as its profile describes it; the tuner starts from the same profile."""
    model = model_of(profile)
    return Platform(
        name=f"{profile.device}, {profile.model}",
        source=profile.source,
        notes=profile.notes,
        machine=Profiled(model),
        page_size=page_size,
        kv_tokens=lambda _: kv_tokens,
        hop_s=hop_s,
        host_s=host_s,
        predictor=lambda: deepcopy(model),
    )
