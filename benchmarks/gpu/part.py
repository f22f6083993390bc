"""A part of the GPU check."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a part found: in words, each naming what was expected, and as data."""

    passed: bool
    found: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """`run` takes at most ten minutes and starts processes of its own for what uses the device."""

    about: str
    run: Callable[[], Outcome]
