"""Host to device: arrays are filled in pinned memory while the one before is still being copied."""

import contextlib
import ctypes
import itertools
import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from semipd_jax.cuda_driver import bindings, call
from semipd_jax.storage.manifest import ArrayEntry, numpy_dtype

_NUM_BUFFERS: Final = 2


class Staging:
    """Two pinned buffers of `num_bytes`, each with a stream of its own."""

    def __init__(self, num_bytes: int) -> None:
        non_blocking = int(bindings().CUstream_flags.CU_STREAM_NON_BLOCKING)
        buffers: list[tuple[int, Any]] = []
        with contextlib.ExitStack() as undo:
            for _ in range(_NUM_BUFFERS):
                host = int(call("cuMemHostAlloc", num_bytes, 0))
                undo.callback(call, "cuMemFreeHost", host)
                stream = call("cuStreamCreate", non_blocking)
                undo.callback(call, "cuStreamDestroy", stream)
                undo.callback(call, "cuStreamSynchronize", stream)
                buffers.append((host, stream))
            self._undo = undo.pop_all()
        self._buffers = itertools.cycle(buffers)

    @contextlib.contextmanager
    def writing(self, entry: ArrayEntry, address: int) -> Iterator[np.ndarray]:
        """An array to fill; when the context ends, its copy to device `address` begins.

        The array's own memory is reused by the next but one: do not keep it.
        """
        host, stream = next(self._buffers)
        call("cuStreamSynchronize", stream)
        data = (ctypes.c_uint8 * entry.num_bytes).from_address(host)
        flat = np.frombuffer(data, numpy_dtype(entry.dtype), math.prod(entry.shape))
        yield flat.reshape(entry.shape)
        call("cuMemcpyHtoDAsync", address, host, entry.num_bytes, stream)

    def close(self) -> None:
        """Waits for all copies and gives the buffers back. Raises CudaError if a copy failed."""
        self._undo.close()
