"""A model's chat template, run within bounds of size and of time.

The sandbox keeps a template from the rest of the process; it does not keep it from looping.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Template


class OutputTooLongError(Exception):
    """A template has written more than it may."""


def render(
    template: Template, variables: Mapping[str, Any], *, max_chars: int, timeout_s: float
) -> str:
    """What `template` writes. Ends by itself in time, so that its thread is free again, unless one
    operation, such as a product of texts, takes long.

    Raises:
      OutputTooLongError: it writes more than `max_chars`.
      TimeoutError: it takes longer than `timeout_s`.
      Exception: whatever happens in a template.
    """
    pieces: list[str] = []
    num_chars = 0
    with _deadline(timeout_s):
        for piece in template.generate(variables):
            num_chars += len(piece)
            if num_chars > max_chars:
                raise OutputTooLongError
            pieces.append(piece)
    return "".join(pieces)


@contextmanager
def _deadline(timeout_s: float) -> Iterator[None]:
    """Inside, functions that this thread calls raise TimeoutError once the time is over."""
    end_s = time.monotonic() + timeout_s

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if time.monotonic() > end_s:
            raise TimeoutError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
