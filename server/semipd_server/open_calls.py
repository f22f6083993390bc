"""Places for calls that may stay open as long as their client likes, apart from those that end by
themselves: neither kind can keep the other out."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from semipd_jax.errors import OverloadedError
from semipd_server.callers import grpc_host


class OpenCalls:
    """Counts open calls of one kind.

    Args:
      what: these calls, in the plural.
      most: at a time, in all.
      most_of_host: at a time, of one host.
    """

    def __init__(self, what: str, *, most: int, most_of_host: int) -> None:
        self._what = what
        self._most = most
        self._most_of_host = most_of_host
        self._open: Counter[str] = Counter()

    @contextmanager
    def one_more(self, peer: str) -> Iterator[None]:
        """Around a call from `peer`, as gRPC calls the other end.

        Raises:
          OverloadedError: no place is left.
        """
        host = grpc_host(peer)[0]
        if self._open.total() >= self._most or self._open[host] >= self._most_of_host:
            raise OverloadedError(
                f"too many {self._what} are open; allowed: {self._most_of_host} of a host, "
                f"{self._most} in all"
            )
        self._open[host] += 1
        try:
            yield
        finally:
            self._open[host] -= 1
            self._open += Counter()  # forgets hosts without any
