"""Places for connections, shared fairly between hosts."""

from typing import Protocol


class Occupant(Protocol):
    """A connection that has a place or wants one."""

    @property
    def host(self) -> str: ...

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being done for it."""
        ...

    def close(self) -> None: ...


class Places[C: Occupant]:
    """At most `most` at a time.

    When all are taken, a newcomer gets the place of an idle connection of a host that holds at
    least as many as the newcomer's: of the host with most of them, the oldest one. So no host keeps
    another one out, or itself, with connections that it does not use.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_taken = 0
        self._by_host: dict[str, dict[C, None]] = {}  # a host's are in the order of their coming

    def take(self, newcomer: C) -> bool:
        """Whether there was a place. Who loses one for it is closed."""
        if self._num_taken == self._most and not self._make_room(newcomer.host):
            return False
        self._by_host.setdefault(newcomer.host, {})[newcomer] = None
        self._num_taken += 1
        return True

    def leave(self, one: C) -> None:
        """Gives back the place of a connection, if it has one."""
        held = self._by_host.get(one.host, {})
        if one in held:
            del held[one]
            self._num_taken -= 1
            if not held:
                del self._by_host[one.host]

    def clear(self) -> None:
        """Closes all that have a place. There are none from now on."""
        self._most = 0
        for held in list(self._by_host.values()):
            for one in list(held):
                self.leave(one)
                one.close()

    def _make_room(self, host: str) -> bool:
        num_own = len(self._by_host.get(host, ()))
        for held in sorted(self._by_host.values(), key=len, reverse=True):
            if len(held) < num_own:
                return False
            if idle := next((one for one in held if one.is_idle), None):
                self.leave(idle)
                idle.close()
                return True
        return False
