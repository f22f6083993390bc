"""Pages and rows whose request is gone while steps that name them may still run.

Law: nothing is used again while a step in flight names it, in either phase.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class _Held:
    step_ids: set[int]
    page_ids: list[int]
    row: int


class Quarantine:
    """Holds (pages, row) until every step named with them has been answered."""

    def __init__(self) -> None:
        self._held: list[_Held] = []

    @property
    def page_ids(self) -> list[int]:
        """Each as often as it is held."""
        return [page for held in self._held for page in held.page_ids]

    @property
    def rows(self) -> list[int]:
        return [held.row for held in self._held]

    def hold(self, page_ids: list[int], row: int, step_ids: Iterable[int]) -> None:
        self._held.append(_Held(set(step_ids), page_ids, row))

    def step_done(self, step_id: int) -> list[tuple[list[int], int]]:
        """Returns the (pages, row) entries that no step in flight names any more."""
        released: list[tuple[list[int], int]] = []
        kept: list[_Held] = []
        for held in self._held:
            held.step_ids.discard(step_id)
            if held.step_ids:
                kept.append(held)
            else:
                released.append((held.page_ids, held.row))
        self._held = kept
        return released
