"""A line that is fair to callers, however many places one of them takes in it."""

from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from typing import Final

CALLER: Final[ContextVar[tuple[str, ...]]] = ContextVar("caller", default=())
"""For whom the current task works, by names that become more special, such as host and connection.
Turns are shared evenly between the first names, those of a first name between its second ones, and
so on."""


class Line[W: Hashable]:
    """Takes waiters in, and gives them back evenly by the names of their callers."""

    def __init__(self) -> None:
        self._own: dict[W, None] = {}
        self._parts: dict[str, Line[W]] = {}  # whose turn is next comes first

    def push(self, waiter: W, names: Sequence[str]) -> None:
        if names:
            self._parts.setdefault(names[0], Line()).push(waiter, names[1:])
        else:
            self._own[waiter] = None

    def pop(self) -> W:
        if self._own:
            waiter = next(iter(self._own))
            del self._own[waiter]
            return waiter
        name = next(iter(self._parts))
        part = self._parts.pop(name)
        waiter = part.pop()
        if part:
            self._parts[name] = part
        return waiter

    def discard(self, waiter: W, names: Sequence[str]) -> None:
        """Takes out who was pushed with these names, if it is still in the line."""
        if not names:
            self._own.pop(waiter, None)
        elif (part := self._parts.get(names[0])) is not None:
            part.discard(waiter, names[1:])
            if not part:
                del self._parts[names[0]]

    def __bool__(self) -> bool:
        return bool(self._own or self._parts)
