"""Places for calls that may stay open as long as their client likes, apart from those that end by
themselves: neither kind can keep the other out."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from semipd_jax.errors import OverloadedError
from semipd_server.callers import grpc_host


class OpenCalls:
    """Places for calls of one kind, shared fairly between hosts.

    When all are taken, a newcomer gets that of the oldest call of the host with most of them,
    unless its own host would then have more. So nobody takes a place from itself: a client that
    comes again when its call is ended would do so for ever.

    Args:
      what: these calls, in the plural.
      most: at a time.
    """

    def __init__(self, what: str, *, most: int) -> None:
        self._what = what
        self._most = most
        self._by_host: dict[str, dict[asyncio.Timeout, None]] = {}  # a host's: oldest first

    @asynccontextmanager
    async def one_more(self, peer: str) -> AsyncGenerator[None]:
        """Around a call from `peer`, as gRPC calls the other end.

        Raises:
          OverloadedError: no place is left, or another host's call got this one's.
        """
        host = grpc_host(peer)[0]
        if sum(map(len, self._by_host.values())) >= self._most:
            self._make_room(host)
        call = asyncio.timeout(None)
        self._by_host.setdefault(host, {})[call] = None
        try:
            async with call:
                yield
        except TimeoutError as error:
            if not call.expired():
                raise
            raise OverloadedError(
                f"too many {self._what} are open, and most of them are of this host; this one made "
                "room for another host"
            ) from error
        finally:
            self._leave(host, call)

    def _make_room(self, host: str) -> None:
        most_of = max(self._by_host, key=lambda other: len(self._by_host[other]))
        if len(self._by_host[most_of]) <= len(self._by_host.get(host, ())) + 1:
            raise OverloadedError(f"too many {self._what} are open; allowed: {self._most} in all")
        oldest = next(iter(self._by_host[most_of]))
        self._leave(most_of, oldest)
        oldest.reschedule(asyncio.get_running_loop().time())

    def _leave(self, host: str, call: asyncio.Timeout) -> None:
        """Gives back the place of a call, if it has one."""
        held = self._by_host.get(host, {})
        held.pop(call, None)
        if not held:
            self._by_host.pop(host, None)
