"""Step times from a roofline: each operation takes the longer of its arithmetic and its memory.

Operations and bytes are counted as in DuetServe (arXiv 2511.04791): linear layers together,
attention per phase, the last projection. A device under the share s reaches s of its arithmetic and
min(1, s / saturation) of its bandwidth, and takes `slowdown` times as long as the roofline says
(Bullet, arXiv 2504.19516, measured 1.61 on average).

Side by side, where both together ask for more bandwidth than there is, the memory time of both
grows by that factor. What becomes of shares that do not fit is not published; these are bounds:

* `normalised`: own / (own + other), as in semi-PD's model (arXiv 2504.19867, section 5). An SM that
  waits for one phase's memory does nothing for the other.
* `conserving`: arithmetic that one phase cannot use while it waits for memory goes to the other.

Nothing else interferes.
"""

from typing import Literal

from semipd_jax.simulator.hardware import Hardware
from semipd_jax.simulator.machine import Load
from semipd_jax.tuner.latency import effective_share
from semipd_jax.tuner.work import Work

type Sharing = Literal["normalised", "conserving"]


class Roofline:
    """
    Args:
      sharing: what becomes of shares that do not fit.
    """

    def __init__(self, hardware: Hardware, sharing: Sharing = "normalised") -> None:
        self.hardware = hardware
        self._sharing = sharing
        device, shape = hardware.device, hardware.shape
        self._saturation = device.saturation
        self._s_per_flop = device.slowdown / (device.flops * shape.tensor_parallel)
        self._s_per_byte = device.slowdown / (device.memory_bytes_per_s * shape.tensor_parallel)
        self._layer_params = shape.layer_params
        self._activations = 2 * shape.num_layers * (4 * shape.d_model + 3 * shape.d_ff)
        self._flops_per_pair = 4 * shape.num_layers * shape.num_heads * shape.head_dim
        self._kv_bytes_per_token = shape.kv_bytes_per_token

    def load(self, works: tuple[Work, ...]) -> Load:
        tokens = sum(work.num_tokens for work in works)
        rows = sum(work.num_rows for work in works)
        ops = [self._linear(tokens), *map(self._attention, works), self._head(rows)]
        return Load(works, tuple(ops), self.hardware.device.step_s + self._communication_s(tokens))

    def alone_s(self, load: Load, share: float) -> float:
        return self._seconds(load, share, 1.0)

    def together_s(self, a: Load, share_a: float, b: Load, share_b: float) -> tuple[float, float]:
        own_a, own_b = effective_share(share_a, share_b), effective_share(share_b, share_a)
        if self._sharing == "conserving":
            unused_a = share_a - self._arithmetic(a, share_a)
            unused_b = share_b - self._arithmetic(b, share_b)
            own_a = min(share_a, max(own_a, 1 - share_b + unused_b))
            own_b = min(share_b, max(own_b, 1 - share_a + unused_a))
        demand = self._demand(a, own_a) + self._demand(b, own_b)
        crowding = max(1.0, demand)
        return self._seconds(a, own_a, crowding), self._seconds(b, own_b, crowding)

    def _seconds(self, load: Load, share: float, crowding: float) -> float:
        per_byte = crowding / min(1.0, share / self._saturation)
        return load.fixed_s + sum(max(c / share, m * per_byte) for c, m in load.ops)

    def _arithmetic(self, load: Load, share: float) -> float:
        """Part of the device's arithmetic that the step uses on average under this share alone."""
        return sum(c for c, _ in load.ops) / self._seconds(load, share, 1.0)

    def _demand(self, load: Load, share: float) -> float:
        """Part of the bandwidth that the step uses on average."""
        return sum(m for _, m in load.ops) / self._seconds(load, share, 1.0)

    def _op(self, flops: int, num_bytes: int) -> tuple[float, float]:
        return flops * self._s_per_flop, num_bytes * self._s_per_byte

    def _linear(self, tokens: int) -> tuple[float, float]:
        num_values = self._layer_params + self._activations * tokens
        num_bytes = self.hardware.shape.bytes_per_value * num_values
        return self._op(2 * tokens * self._layer_params, num_bytes)

    def _attention(self, work: Work) -> tuple[float, float]:
        num_bytes = self._kv_bytes_per_token * (work.context_tokens + work.num_tokens)
        return self._op(self._flops_per_pair * work.num_pairs, num_bytes)

    def _head(self, rows: int) -> tuple[float, float]:
        shape = self.hardware.shape
        size = shape.vocab_size * shape.d_model
        return self._op(2 * rows * size, shape.bytes_per_value * size)

    def _communication_s(self, tokens: int) -> float:
        """Two ring all-reduces per layer."""
        device, shape = self.hardware.device, self.hardware.shape
        if shape.tensor_parallel == 1:
            return 0.0
        parts = 2 * (shape.tensor_parallel - 1) / shape.tensor_parallel
        num_bytes = parts * tokens * shape.d_model * shape.bytes_per_value
        return 2 * shape.num_layers * (device.allreduce_s + num_bytes / device.link_bytes_per_s)
