"""How much of a memory the engine may take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What is there for weights and shared state.

    Attributes:
      available_bytes: for both together.
      detail: how that number came about, for whoever it is too small for, and what is kept back for
        workers.
      pool_takes_rest: unless told its size, the KV pool takes all that the weights leave. Else it
        takes what requests could fill, or a part of the rest: other programs need the memory too.
      worker_fraction: of the device's memory, what the backend of one worker may allocate; None if
        it is not limited.
    """

    available_bytes: int
    detail: str = ""
    pool_takes_rest: bool = False
    worker_fraction: float | None = None
