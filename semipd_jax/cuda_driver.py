"""The CUDA driver API with every status checked. The only module that imports `cuda.bindings`.

Nothing here touches the driver before it is called, so machines without one can import it.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Final

from semipd_jax.errors import EngineError, StartupError

_NAME_BYTES: Final = 128


class CudaError(EngineError):
    """A driver call failed: `call` is its name, `result` the name of the CUresult."""

    def __init__(self, call: str, result: str) -> None:
        super().__init__(f"{call} failed with {result}")
        self.call = call
        self.result = result


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A GPU. `num_sms` is what this process may use: under an MPS percentage, fewer than all."""

    ordinal: int
    name: str
    num_sms: int
    total_bytes: int
    driver_version: int


@functools.cache
def bindings() -> Any:
    """The module `cuda.bindings.driver`, initialised.

    Raises StartupError if the bindings or the driver are missing, CudaError if the driver refuses.
    """
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise StartupError(
            f"device 'cuda' needs cuda-bindings: install semipd-jax[cuda13] ({error})"
        ) from error
    try:
        _check("cuInit", driver.cuInit(0))
    except CudaError:
        raise
    except RuntimeError as error:  # cuda.bindings found no libcuda
        raise StartupError(f"no NVIDIA driver is here: {error}") from error
    return driver


def call(name: str, *args: Any) -> Any:
    """Calls the driver function `name`. Returns its one result, a list of several, or None.

    Raises CudaError for any status but success.
    """
    return _check(name, getattr(bindings(), name)(*args))


def describe(ordinal: int) -> DeviceInfo:
    """Asks for properties only; makes no context."""
    cu = bindings()
    device = call("cuDeviceGet", ordinal)
    name = call("cuDeviceGetName", _NAME_BYTES, device)
    return DeviceInfo(
        ordinal=ordinal,
        name=bytes(name).split(b"\0")[0].decode(),
        num_sms=int(
            call(
                "cuDeviceGetAttribute",
                cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                device,
            )
        ),
        total_bytes=int(call("cuDeviceTotalMem", device)),
        driver_version=int(call("cuDriverGetVersion")),
    )


def describe_all() -> list[DeviceInfo]:
    return [describe(ordinal) for ordinal in range(int(call("cuDeviceGetCount")))]


def enter_context(ordinal: int) -> Any:
    """Makes the device's primary context, the one that XLA uses, current on this thread.

    Returns the device, for `leave_context`.
    """
    device = call("cuDeviceGet", ordinal)
    context = call("cuDevicePrimaryCtxRetain", device)
    try:
        call("cuCtxSetCurrent", context)
    except CudaError:
        call("cuDevicePrimaryCtxRelease", device)
        raise
    return device


def leave_context(device: Any) -> None:
    call("cuDevicePrimaryCtxRelease", device)


def _check(name: str, answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise CudaError(name, getattr(status, "name", str(status)))
    if not values:
        return None
    return values[0] if len(values) == 1 else values
