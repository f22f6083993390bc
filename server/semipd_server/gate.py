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
_ASK_EVERY_S: Final = 0.2


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
        self._asking = asyncio.Lock()
        self._asked_s = float("-inf")
        self._silence: str | None = None

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
        """Why the engine cannot serve right now; None if it can: the coordinator was asked, though
        not more often than now and then, since anybody may want to know."""
        engine = self._engine
        if engine is None or self.waiting_for:
            reason = self._refusal if engine is None else "the engine waits"
            return "; ".join((reason, *self.waiting_for))
        async with self._asking:
            loop = asyncio.get_running_loop()
            if loop.time() - self._asked_s >= _ASK_EVERY_S:
                self._silence = await _silence_of(engine.client)
                self._asked_s = loop.time()
            return self._silence


async def _silence_of(client: EngineClient) -> str | None:
    """Why the coordinator does not answer, or None if it does."""
    try:
        await client.stats(timeout_s=_STATS_TIMEOUT_S)
    except UnavailableError as error:
        return str(error)
    return None
