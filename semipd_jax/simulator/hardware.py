"""Descriptions of devices and models for the roofline: data sheets, shapes, named assumptions."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, Literal

import msgspec

from semipd_jax.config import require
from semipd_jax.errors import ConfigError

SCHEMA: Final = "semipd.hardware/1"


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Attributes:
      flops: dense bfloat16 operations per second.
      memory_bytes_per_s, memory_bytes: of the device memory.
      link_bytes_per_s: to another device, in one direction.
      slowdown: measured over roofline time.
      saturation: share of the device that reaches the whole memory bandwidth.
      step_s: of every step, whatever it computes.
      hop_s: from the end of a step to the start of the next one, if that was not sent ahead.
      allreduce_s: latency of one all-reduce.
      process_bytes: device memory of a worker process, beside weights and KV.
      memory_utilization: part of the memory that is used.
    """

    name: str
    flops: float
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    slowdown: float
    saturation: float
    step_s: float
    hop_s: float
    allreduce_s: float
    process_bytes: float
    memory_utilization: float


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dense Llama-like model on `tensor_parallel` devices."""

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    bytes_per_value: int
    tensor_parallel: int

    @property
    def layer_params(self) -> int:
        """Of all layers together."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return self.num_layers * self.d_model * (heads * self.head_dim + 3 * self.d_ff)

    @property
    def weight_bytes(self) -> int:
        return self.bytes_per_value * (self.layer_params + 2 * self.vocab_size * self.d_model)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_value


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Attributes:
      notes: where the numbers come from, and which are assumptions.
    """

    schema: str = SCHEMA
    source: Literal["modelled"] = "modelled"
    notes: tuple[str, ...]
    device: Device
    shape: Shape

    def kv_tokens(self, *, num_processes: int) -> int:
        """Tokens that fit beside the weights and so many worker processes on each device."""
        device, shape = self.device, self.shape
        usable = device.memory_bytes * device.memory_utilization
        usable -= num_processes * device.process_bytes
        free = usable * shape.tensor_parallel - shape.weight_bytes
        require(free > 0, "num_processes", num_processes, "few enough to leave memory for KV")
        return int(free / shape.kv_bytes_per_token)


def from_json(text: str | bytes) -> Hardware:
    """Raises ConfigError that names what is wrong."""
    try:
        hardware = msgspec.json.decode(text, type=Hardware)
    except msgspec.DecodeError as error:
        raise ConfigError(f"this is no hardware description: {error}") from error
    require(hardware.schema == SCHEMA, "schema", hardware.schema, SCHEMA)
    for part in (hardware.device, hardware.shape):
        for name, value in msgspec.structs.asdict(part).items():
            require(isinstance(value, str) or value > 0, name, value, "above 0")
    device = hardware.device
    require(device.saturation <= 1, "saturation", device.saturation, "at most 1")
    return hardware


def shipped() -> list[str]:
    """Names that `read` knows."""
    names = (path.name for path in _folder().iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def read(name_or_path: str) -> Hardware:
    """A shipped description by name, or a file."""
    if name_or_path in shipped():
        return from_json((_folder() / f"{name_or_path}.json").read_bytes())
    path = Path(name_or_path)
    require(path.is_file(), "hardware", name_or_path, f"a file, or {', '.join(shipped())}")
    return from_json(path.read_bytes())


def _folder() -> Traversable:
    return files("semipd_jax.simulator") / "hardware_data"
