"""Free list of page ids. Host-only, single owner, O(1) per page."""

from collections.abc import Iterable


class PageAllocator:
    """Hands out page ids in [1, num_pages); page 0 is scratch and never handed out."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int] | None:
        """Returns `n` page ids, or None (and takes nothing) if fewer are free."""
        if n > len(self._free):
            return None
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        return taken

    def free(self, page_ids: Iterable[int]) -> None:
        self._free.extend(page_ids)

    def check(self, held: Iterable[int]) -> None:
        """Raises AssertionError unless free and held pages partition the pool."""
        pages = sorted([*self._free, *held])
        if pages != list(range(1, self.num_pages)):
            raise AssertionError(f"pages leaked or held twice: {pages}")
