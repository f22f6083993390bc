"""Whose turn it is: streams of many callers share one event loop.

To write a message costs an event loop tens of microseconds, so that a thousand streams with news
keep it busy for longer than a token takes. They get turns: few at a time, so that the loop soon
sees what else has come, and in such an order that no caller waits for the streams of another one.
What a stream gets while it waits for its turn is merged into one message.
"""

import asyncio
from typing import Final, Protocol, runtime_checkable

from semipd_jax.client.line import Line

MAX_TURNS: Final = 16
MAX_TURN_S: Final = 0.005
"""A turn ends when its message is written. Who does not read must not hold others up: after this
time the next one is served anyway."""


@runtime_checkable
class Waiter(Protocol):
    """Who takes turns."""

    @property
    def caller(self) -> tuple[str, ...]: ...

    def begin(self) -> None:
        """It is this one's turn. Must not ask for the next one yet."""
        ...


class Turns:
    """At most `MAX_TURNS` at a time. Belongs to the event loop that runs it."""

    def __init__(self) -> None:
        self._line = Line[Waiter]()
        self._begun_s: dict[Waiter, float] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, waiter: Waiter) -> None:
        """Calls `waiter.begin` once: now, or when it is its turn."""
        if len(self._begun_s) < MAX_TURNS:
            self._begin(waiter)
        else:
            self._line.push(waiter, waiter.caller)
            self._watch()

    def over(self, waiter: Waiter) -> None:
        """The waiter's turn has ended, or is not wanted any more."""
        self._line.discard(waiter, waiter.caller)
        self._begun_s.pop(waiter, None)
        self._begin_next()

    def _begin(self, waiter: Waiter) -> None:
        self._begun_s[waiter] = asyncio.get_running_loop().time()
        waiter.begin()

    def _begin_next(self) -> None:
        while self._line and len(self._begun_s) < MAX_TURNS:
            self._begin(self._line.pop())

    def _watch(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(MAX_TURN_S, self._end_long_turns, loop)

    def _end_long_turns(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        latest_s = loop.time() - MAX_TURN_S
        for waiter in [w for w, begun_s in self._begun_s.items() if begun_s <= latest_s]:
            del self._begun_s[waiter]
        self._begin_next()
        if self._line:
            self._watch()
