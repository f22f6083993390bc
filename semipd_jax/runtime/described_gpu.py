"""GPUs that exist as a description only: programs compile for them on machines without one.

XLA and both Pallas backends then run down to machine code. What a device alone can tell is missing:
matrix products get default kernels, as nothing is timed.

Needs the packages of the extra `aot`, and that jax runs on the CPU (`JAX_PLATFORMS=cpu`): on any
other platform the CUDA plugin asks for a driver. A kernel that the target cannot run may abort the
process inside LLVM.
"""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from semipd_jax.errors import StartupError

type GpuName = Literal["h100", "h200", "a100"]

GPU_NAMES: Final[tuple[GpuName, ...]] = ("h100", "h200", "a100")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a thread block and the blocks of one SM can have together."""

    block_shared_bytes: int
    sm_shared_bytes: int
    sm_registers: int
    sm_threads: int


class DescribedGpu:
    """One GPU of `targets`, whole or with fewer SMs: as a process sees it under a share of MPS.

    Raises StartupError without the packages of the extra `aot`.
    """

    def __init__(self, name: GpuName, *, num_sms: int | None = None) -> None:
        if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
            raise StartupError(
                "compiling for a GPU that is not here needs: pip install 'semipd-jax[aot]'"
            )
        text = (resources.files("semipd_jax.runtime") / "targets" / f"{name}.txtpb").read_text()
        numbers = {key: int(n) for key, n in re.findall(r"^ *(\w+): (\d+)\b", text, re.MULTILINE)}
        kinds = re.findall(r'^device_description_str: "(.*)"', text, re.MULTILINE)
        self.name: GpuName = name
        self.num_sms = num_sms or numbers["core_count"]
        self.memory_bytes = numbers["device_memory_size"]
        self.limits = Limits(
            block_shared_bytes=numbers["shared_memory_per_block_optin"],
            sm_shared_bytes=numbers["shared_memory_per_core"],
            sm_registers=numbers["registers_per_core_limit"],
            sm_threads=numbers["threads_per_core_limit"],
        )
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=re.sub(r"core_count: \d+", f"core_count: {self.num_sms}", text),
            topology="1x1x1",
        )
        self._device = topology.devices[0]
        mesh = topologies.make_mesh(topology, (1,), ("x",))
        self._sharding = NamedSharding(mesh, PartitionSpec())
        abstract = AbstractDevice(device_kind=kinds[0], platform="gpu", num_cores=self.num_sms)
        self._abstract_mesh = AbstractMesh((), (), abstract_device=abstract)

    def place[T](self, tree: T) -> T:
        """The tree with arrays and `jax.ShapeDtypeStruct`s as abstract arrays on this GPU."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), tree
        )

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """What is traced, lowered and compiled inside is for this GPU, if its arguments are.

        Both settings are needed: without the device Mosaic takes any target for a Hopper GPU, and
        without the mesh Triton finds no GPU to lower for.
        """
        with jax.default_device(self._device), jax.sharding.use_abstract_mesh(self._abstract_mesh):
            yield

    def compile(self, fn: Any, *args: Any, donate_argnums: tuple[int, ...] = ()) -> Any:
        """The `jax.stages.Compiled` of fn for abstract arguments like `args`."""
        with self.tracing():
            return jax.jit(fn, donate_argnums=donate_argnums).lower(*self.place(args)).compile()
