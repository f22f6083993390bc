"""Whose turn it is: streams of many callers share one event loop.

To write a message costs an event loop tens of microseconds, so that a thousand streams with news
keep it busy for longer than a token takes. They get turns: few at a time, so that the loop soon
sees what else has come, and in such an order that no caller waits for the streams of another one.
What a stream gets while it waits for its turn is merged into one message.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final, Protocol, runtime_checkable

MAX_TURNS: Final = 16
MAX_TURN_S: Final = 0.005
"""A turn ends when its message is written. Who does not read must not hold others up: after this
time the next one is served anyway."""

CALLER: Final[ContextVar[tuple[str, ...]]] = ContextVar("caller", default=())
"""For whom the current task works, by names that become more special, such as host and connection.
Turns are shared evenly between the first names, those of a first name between its second ones, and
so on."""


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
        self._line = _Line()
        self._waiting: set[Waiter] = set()
        self._begun_s: dict[Waiter, float] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, waiter: Waiter) -> None:
        """Calls `waiter.begin` once: now, or when it is its turn."""
        if len(self._begun_s) < MAX_TURNS:
            self._begin(waiter)
        else:
            self._waiting.add(waiter)
            self._line.push(waiter, waiter.caller)
            self._watch()

    def over(self, waiter: Waiter) -> None:
        """The waiter's turn has ended, or is not wanted any more."""
        self._waiting.discard(waiter)
        self._begun_s.pop(waiter, None)
        self._begin_next()

    def _begin(self, waiter: Waiter) -> None:
        self._begun_s[waiter] = asyncio.get_running_loop().time()
        waiter.begin()

    def _begin_next(self) -> None:
        while self._waiting and len(self._begun_s) < MAX_TURNS:
            waiter = self._line.pop()
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._begin(waiter)
        if not self._waiting:
            self._line = _Line()  # those in it have left

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
        if self._waiting:
            self._watch()


class _Line:
    """Takes waiters in, and gives them back evenly by the names of their callers."""

    def __init__(self) -> None:
        self._own: deque[Waiter] = deque()
        self._parts: dict[str, _Line] = {}  # whose turn is next comes first

    def push(self, waiter: Waiter, names: Sequence[str]) -> None:
        if names:
            self._parts.setdefault(names[0], _Line()).push(waiter, names[1:])
        else:
            self._own.append(waiter)

    def pop(self) -> Waiter:
        if self._own:
            return self._own.popleft()
        name = next(iter(self._parts))
        part = self._parts.pop(name)
        waiter = part.pop()
        if part:
            self._parts[name] = part
        return waiter

    def __bool__(self) -> bool:
        return bool(self._own or self._parts)
