"""The door that all protocols share: whether requests may come in, and how many are inside."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from semipd_jax.client import EngineClient
from semipd_jax.config import SchedulerConfig
from semipd_jax.errors import UnavailableError
from semipd_server.calls import Calls
from semipd_server.pb import inference_pb2 as pb

STARTING: Final = "the engine is starting"
SHUTTING_DOWN: Final = "the server is shutting down"
_STATS_TIMEOUT_S: Final = 2.0
_ASK_EVERY_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Engine:
    """What is served, and what its queue takes."""

    client: EngineClient
    info: pb.GetModelInfoResponse
    limits: SchedulerConfig


class Gate:
    """Lets nothing in until it is given an engine. Once closed, it lets no new work in, but who
    wants to know or to end something still finds the engine.

    Attributes:
      waiting_for: parts of the engine that are not ready, and how far they are.
      calls: gRPC calls, counted.
    """

    def __init__(self) -> None:
        self.waiting_for: tuple[str, ...] = ()
        self.calls = Calls()
        self._engine: Engine | None = None
        self._refusal: str | None = STARTING
        self._num_inside = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._asking = asyncio.Lock()
        self._asked_s = float("-inf")
        self._silence: str | None = None

    def open(self, engine: Engine) -> None:
        self._engine, self._refusal = engine, None

    def close(self, reason: str) -> None:
        """New work is refused; what runs goes on."""
        self._refusal = reason

    @property
    def refusal(self) -> str | None:
        """Why new work is refused; None while it is not."""
        return self._refusal

    @property
    def engine(self) -> Engine:
        """For anything but new work. Raises UnavailableError while there is none."""
        if self._engine is None:
            raise UnavailableError(self._refusal)
        return self._engine

    def admit(self) -> Engine:
        """The engine, for new work. Raises UnavailableError while that is refused."""
        if self._refusal is not None:
            raise UnavailableError(self._refusal)
        return self.engine

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
        if self._refusal is not None or self.waiting_for:
            return "; ".join((self._refusal or "the engine waits", *self.waiting_for))
        async with self._asking:
            loop = asyncio.get_running_loop()
            if loop.time() - self._asked_s >= _ASK_EVERY_S:
                self._silence = await _silence_of(self.engine.client)
                self._asked_s = loop.time()
            return self._silence


async def _silence_of(client: EngineClient) -> str | None:
    """Why the coordinator does not answer, or None if it does."""
    try:
        await client.stats(timeout_s=_STATS_TIMEOUT_S)
    except UnavailableError as error:
        return str(error)
    return None
