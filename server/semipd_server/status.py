"""Errors as gRPC statuses, and back: the table of the contract, in one place."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from semipd_jax.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    RequestNotFoundError,
    RequestTimeoutError,
    UnavailableError,
)
from semipd_server.convert import field_path
from semipd_server.handlers import Context

_CODES: Final[dict[type[Exception], grpc.StatusCode]] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    RequestNotFoundError: grpc.StatusCode.NOT_FOUND,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    RequestFailedError: grpc.StatusCode.ABORTED,
    RequestTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_ERRORS: Final = {code: error for error, code in _CODES.items()}
_RETRY_AFTER_S: Final = 1
_REQUEST_TIMEOUT: Final = error_details_pb2.ErrorInfo(reason="REQUEST_TIMEOUT", domain="semipd.v1")
_MAX_MESSAGE_BYTES: Final = 1000
"""Of a status, which travels in headers: percent-encoded, and twice in base64. Clients limit them
to 8 KiB."""

_log = logging.getLogger(__name__)


async def abort_with(
    context: Context,
    error: Exception,
    path_of: Callable[[str], str] = field_path,
) -> NoReturn:
    """Ends a call with the status of `error`. What the contract does not name is INTERNAL, and says
    no more than a number that is also in the log.

    Args:
      path_of: a field that an InvalidRequestError names → where it is in the contract's request.
    """
    if type(error) not in _CODES:
        error_id = uuid.uuid4().hex[:12]
        _log.error("internal error %s", error_id, exc_info=error)
        text = f"internal error {error_id}; the server's log says more"
        await context.abort(grpc.StatusCode.INTERNAL, text)
    status = rpc_status.to_status(status_of(error, path_of))
    metadata = [*status.trailing_metadata]
    if isinstance(error, OverloadedError):
        metadata.append(("grpc-retry-pushback-ms", str(1000 * _RETRY_AFTER_S)))
    await context.abort(status.code, status.details, tuple(metadata))


def end(context: Context, code: grpc.StatusCode, text: str) -> None:
    """Ends a call at once, whatever its task waits for: what that wants of gRPC from now on raises.
    The status comes after what the client has not read, should it ever read on."""
    loop = asyncio.get_running_loop()
    status = asyncio.Task(_abort(context, code, text), loop=loop, eager_start=True)
    _last_words.add(status)
    status.add_done_callback(_said)


async def _abort(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)


_last_words: Final[set[asyncio.Task[Any]]] = set()  # the event loop itself keeps no hold of them


def _said(status: asyncio.Task[Any]) -> None:
    """`abort` always raises; by then nobody cares."""
    _last_words.discard(status)
    if not status.cancelled():
        status.exception()


def refusal(code: grpc.StatusCode, text: str) -> Any:
    """A handler that ends a call of any kind with this status, before its message is read."""
    return _handler(lambda context: context.abort(code, text))


def refused(error: Exception) -> Any:
    """`refusal` with the status of `error`."""
    return _handler(lambda context: abort_with(context, error))


def _handler(end: Callable[[Context], Awaitable[NoReturn]]) -> Any:
    async def refuse(_requests: object, context: Context) -> None:
        await end(context)

    return grpc.stream_stream_rpc_method_handler(refuse)


def status_of(error: Exception, path_of: Callable[[str], str] = field_path) -> status_pb2.Status:
    """The rich status of an error that the contract names. `path_of`: see `abort_with`."""
    message = str(error).encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
    status = status_pb2.Status(code=_CODES[type(error)].value[0], message=message)
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=path_of(error.field), description=message
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration(seconds=_RETRY_AFTER_S)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, RequestTimeoutError):
        status.details.add().Pack(_REQUEST_TIMEOUT)
    return status


def in_a_line(error: Exception) -> str:
    """For a person: an RpcError's own text has many lines."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)


def error_from(error: Any) -> Exception:
    """What the server meant by an RpcError of a blocking or an asynchronous call. A deadline
    that the client chose is a TimeoutError; what the contract does not name stays as it is."""
    code, message = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        info = _detail(error, error_details_pb2.ErrorInfo())
        return RequestTimeoutError(message) if info == _REQUEST_TIMEOUT else TimeoutError(message)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        bad_request = _detail(error, error_details_pb2.BadRequest())
        violations = bad_request.field_violations if bad_request else ()
        return InvalidRequestError(message, field=violations[0].field if violations else "")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        is_queue = _detail(error, error_details_pb2.RetryInfo()) is not None
        return OverloadedError(message) if is_queue else error
    return _ERRORS[code](message) if code in _ERRORS else error


def _detail[M: Message](error: grpc.Call, kind: M) -> M | None:
    """The detail of this kind that came with a status."""
    status = rpc_status.from_call(error)
    found = status is not None and any(detail.Unpack(kind) for detail in status.details)
    return kind if found else None
