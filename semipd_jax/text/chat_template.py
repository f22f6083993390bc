"""A model's chat template, run within bounds of size and of time.

The sandbox keeps a template from the rest of the process; it does not keep it from looping.
"""

from collections.abc import Mapping
from typing import Any, Final

from jinja2 import Template

from semipd_jax.text.deadline import Deadlines

_deadlines: Final = Deadlines()


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
    return _deadlines.within(timeout_s, lambda: _render(template, variables, max_chars))


def _render(template: Template, variables: Mapping[str, Any], max_chars: int) -> str:
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate(variables):
        num_chars += len(piece)
        if num_chars > max_chars:
            raise OutputTooLongError
        pieces.append(piece)
    return "".join(pieces)
