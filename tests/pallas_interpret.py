"""Runs Pallas GPU kernels on the CPU: `run_mosaic` with race detection, and `run_triton`.

Mosaic's interpreter lacks `mma`, `wgmma` with its left operand in registers and `run_state` of an
accumulator, and does not see what `wgmma` reads from shared memory. This module adds all four:
every read of `wgmma` is checked as one of the async proxy, so that a missing wait, a slot released
too early and a missing `commit_smem` are races. What stays invisible: that `wgmma` is
asynchronous, and layouts.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret as interpreter
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state.types import AbstractRef
from jax.experimental import io_callback
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas.compat import pl, plgpu

HOPPER = "NVIDIA H100 80GB HBM3"

ASYNC_CLOCKS = 256
"""Places in vector clocks for asynchronous operations, which take them in turns.

An operation that has a place of its own is ordered with others by synchronisation alone. If two
share a place, the clock of one may exceed that of the other by chance, depending on how the threads
interleave, and a race between them passes for an order. Thread blocks start anew.
"""


class RaceError(Exception):
    """A kernel has a data race; where is on stdout."""


def run_mosaic(function: Callable[..., Any], *args: Any, num_sms: int = 3) -> Any:
    """function(*args) on a Hopper GPU of `num_sms` SMs.

    Thread blocks run one after another, so only races inside a block are seen: all of them where a
    block has at most `ASYNC_CLOCKS` asynchronous operations, whatever its threads' timing.

    Raises:
      RaceError: the first race of any kernel.
    """
    device = AbstractDevice(device_kind=HOPPER, platform="gpu", num_cores=num_sms)
    params = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=ASYNC_CLOCKS)
    _races.clear()
    try:
        with (
            jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)),
            plgpu.force_gpu_interpret_mode(params),
            _compiled_quickly(),
            mock.patch.object(pl, "run_state", _accumulate),
        ):
            result = jax.block_until_ready(function(*args))
    except Exception as error:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        if "RACE DETECTED" in str(error):
            raise RaceError(str(error)) from error
        raise
    if any(race.races_found for race in _races):
        raise RaceError("see stdout")
    return result


def run_triton(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) with its Triton kernels interpreted."""
    with (
        plgpu.force_gpu_interpret_mode(True),  # pyright: ignore[reportArgumentType]
        _compiled_quickly(),
    ):
        return jax.block_until_ready(function(*args))


@contextlib.contextmanager
def _compiled_quickly() -> Iterator[None]:
    """Interpreted kernels take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


_races: list[gpu_callbacks.GPURaceDetectionState] = []  # of each kernel since run_mosaic began
_RaceDetectionState = gpu_callbacks.GPURaceDetectionState


def _record_races(*args: Any, **kwargs: Any) -> gpu_callbacks.GPURaceDetectionState:
    _races.append(_RaceDetectionState(*args, **kwargs))
    return _races[-1]


def _mma(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return acc + jnp.dot(a.astype(acc.dtype), b.astype(acc.dtype))


def _accumulate(body: Callable[..., None]) -> Callable[..., jax.Array]:
    """`run_state` of one accumulator, to which `body` only adds."""

    def run(initial):
        def scoped(acc_ref):
            body(acc_ref)
            return acc_ref[...]

        acc = initial._init
        return acc + pl.run_scoped(scoped, plgpu.ACC(acc.shape, acc.dtype))

    return run


def _interpret_wgmma(self, eqn, token, get_invals):
    acc, a, b, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] for name in ("acc", "a", "b")]
    trees = [tree or jax.tree.structure([]) for tree in trees]
    transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    operands = [
        interpreter.resolve_ref(var.aval, value, transform)
        if isinstance(var.aval, AbstractRef)
        else (value, None)
        for var, value, transform in zip(eqn.invars[:3], (acc, a, b), transforms, strict=True)
    ]

    @gpu_callbacks.fail_on_exception
    def callback(*, token, thread, mesh_location, operands):
        info = memory.GPULoggingInfo(mesh_location, thread, eqn.source_info)
        _wgmma(thread, info, *operands)
        return token

    token = io_callback(
        callback,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
        mesh_location=self.mesh_location,
        operands=operands,
    )
    return token, []


def _wgmma(thread, info, acc, a, b):
    """acc += a @ b; operands are (key of a buffer, transforms) or (value, None)."""
    shared_memory = gpu_callbacks._get_shared_memory()

    def locate(operand):
        key, transforms = operand
        transforms = gpu_callbacks._remove_noop_transforms(transforms)
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        return key, shared_memory.access(key, jax.tree.map(int, transforms))

    clock = None
    if shared_memory.detect_races:  # on a clock of its own, as the interpreter does for TMA
        position = shared_memory.get_next_tma_thread_id()
        with shared_memory.lock:
            shared_memory.clocks[thread].inc(position)
            clock = shared_memory.clocks[thread].async_smem_clock.copy()

    def read(operand):
        if operand[1] is None:
            return np.asarray(operand[0])
        key, access = locate(operand)
        value, _, _ = shared_memory.get_buffer_content(key, access, thread, logging_info=info)
        if clock is not None:
            gpu_callbacks.get_races().check_read(thread, clock, key, access, info.source_info)
        return value

    key, access = locate(acc)
    value, _, _ = shared_memory.get_buffer_content(key, access, thread, logging_info=info)
    product = read(a).astype(value.dtype) @ read(b).astype(value.dtype)
    shared_memory.store_buffer_content(key, access, value + product, thread, logging_info=info)


gpu_callbacks.GPURaceDetectionState = _record_races
mlir.register_lowering(primitives.mma_p, mlir.lower_fun(_mma, multiple_results=False), "cpu")
interpreter.JaxprInterpreter._interpret_wgmma_ref_p = _interpret_wgmma
