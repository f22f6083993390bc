"""Where a request belongs in its caller's trace, from the edge to whoever records it."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Final

TRACE_CONTEXT: Final[ContextVar[Mapping[str, str]]] = ContextVar("trace_context")
"""W3C trace context of the call that is being answered."""

_FIELDS: Final = ("traceparent", "tracestate")


def set_trace_context(headers: Mapping[str, str | bytes]) -> None:
    """Keeps what the call's headers say of it."""
    found = {name: value for name in _FIELDS if isinstance(value := headers.get(name), str)}
    TRACE_CONTEXT.set(found)
