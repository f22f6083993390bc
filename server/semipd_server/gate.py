"""The door that all protocols share: whether requests may come in, and how many are inside."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from semipd_jax.client import EngineClient
from semipd_jax.errors import UnavailableError
from semipd_server.calls import Calls
from semipd_server.pb import inference_pb2 as pb

STARTING: Final = "the engine is starting"
SHUTTING_DOWN: Final = "the server is shutting down"
_STATS_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Engine:
    """What is served."""

    client: EngineClient
    info: pb.GetModelInfoResponse


class Gate:
    """Refuses everything until it is given an engine, and again when it is closed.

    Attributes:
      waiting_for: parts of the engine that are not ready, and how far they are.
      calls: gRPC calls, counted.
    """

    def __init__(self) -> None:
        self.waiting_for: tuple[str, ...] = ()
        self.calls = Calls()
        self._engine: Engine | None = None
        self._refusal = STARTING
        self._num_inside = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, engine: Engine) -> None:
        self._engine = engine

    def close(self, reason: str) -> None:
        """New requests are refused; running ones go on."""
        self._engine, self._refusal = None, reason

    @property
    def is_open(self) -> bool:
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """Raises UnavailableError while there is none."""
        if self._engine is None:
            raise UnavailableError(self._refusal)
        return self._engine

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around every request."""
        self._num_inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._idle.set()

    async def until_idle(self) -> None:
        """Returns when no request is running."""
        await self._idle.wait()

    async def problem(self) -> str | None:
        """Why the engine cannot serve right now; None if it can: the coordinator was asked."""
        if self._engine is None or self.waiting_for:
            reason = self._refusal if self._engine is None else "the engine waits"
            return "; ".join((reason, *self.waiting_for))
        try:
            await self._engine.client.stats(timeout_s=_STATS_TIMEOUT_S)
        except UnavailableError as error:
            return str(error)
        return None
