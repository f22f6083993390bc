"""Bearer tokens: who may call. Health checks are open; everything else is not."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextvars import ContextVar
from typing import Any, Final

import grpc

from semipd_server.status import refusal

REFUSAL: Final = "missing or wrong API key; send the header 'authorization: Bearer <key>'"
HOLDER: Final[ContextVar[str]] = ContextVar("holder", default="")
"""The key of the gRPC call that is being answered, by `Keys.holder`."""


class Keys:
    """The API keys that are accepted; without any, everyone is.

    Only digests are kept, and all of them are compared in constant time, so that neither memory
    dumps nor response times tell a key.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def holder(self, authorization: str | None) -> str | None:
        """Which key is in the value of an `authorization` header, by its number. "" without keys;
        None: it may not pass."""
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            return None
        return str(matches.index(True))


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Ends every call without an accepted key with UNAUTHENTICATED, except those of methods that do
    not exist, which are UNIMPLEMENTED to everyone.

    Args:
      open_methods: full names of what needs no key.
    """

    def __init__(self, keys: Keys, open_methods: Collection[str] = ()) -> None:
        self._keys = keys
        self._open_methods = open_methods

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        handler = await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata or ())
        is_open = handler is None or handler_call_details.method in self._open_methods
        holder = self._keys.holder(_text(metadata.get("authorization")))
        if is_open or holder is not None:
            HOLDER.set(holder or "")
            return handler
        return refusal(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _text(value: str | bytes | None) -> str | None:
    return value.decode("latin-1") if isinstance(value, bytes) else value
