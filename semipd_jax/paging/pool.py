"""Every page of the pool: free, referenced, or sealed and kept for whoever brings the same prefix.

A page is private to one request until it is full and its KV is known to be written. Then it may be
sealed under its key (`paging.keys`): from there on it is read-only, and every request whose tokens
have this key may reference it. A sealed page that nobody references stays where it is until its
space is needed; the least recently used one goes first, and of one sequence the end before the
beginning, because a page is found only through the pages before it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from semipd_jax.paging.allocator import PageAllocator


class PagePool:
    """Owns the pages [1, num_pages); page 0 is scratch. Host-only, single owner."""

    def __init__(self, num_pages: int) -> None:
        self._free = PageAllocator(num_pages)
        self._num_references = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages
        self._sealed: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = (
            OrderedDict()
        )  # sealed and unreferenced, oldest first

    @property
    def num_available(self) -> int:
        """Pages that nobody references: free ones, and sealed ones that would be given up."""
        return self._free.num_free + len(self._unused)

    @property
    def num_sealed(self) -> int:
        return len(self._sealed)

    @property
    def num_unused(self) -> int:
        """Sealed pages that nobody references."""
        return len(self._unused)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The sealed pages of the longest prefix of `keys` that is there. Takes nothing."""
        page_ids: list[int] = []
        for key in keys:
            page = self._sealed.get(key)
            if page is None:
                break
            page_ids.append(page)
        return page_ids

    def has(self, page: int, key: bytes, *, held: bool) -> bool:
        """Whether the page that `match` once returned for `key` still has it and, if `held`, is
        referenced."""
        return self._key_of[page] == key and (not held or self._num_references[page] > 0)

    def num_unreferenced(self, page_ids: Iterable[int]) -> int:
        """How many of these are available, and would not be once referenced."""
        return sum(self._num_references[page] == 0 for page in page_ids)

    def num_exclusive(self, page_ids: Iterable[int]) -> int:
        """How many pages would be available if their holders let go of them. `page_ids` names each
        page once for each of these holders."""
        return sum(self._num_references[page] == n for page, n in Counter(page_ids).items())

    def num_leading_shared(self, page_ids: Sequence[int]) -> int:
        """How many of a holder's first pages others reference too."""
        for i, page in enumerate(page_ids):
            if self._num_references[page] == 1:
                return i
        return len(page_ids)

    def reference(self, page_ids: Iterable[int]) -> None:
        """One more holder of pages that `match` returned just now."""
        for page in page_ids:
            self._num_references[page] += 1
            self._unused.pop(page, None)

    def allocate(self, n: int) -> list[int] | None:
        """Returns `n` private pages, or None (and takes nothing) if fewer are available."""
        if n > self.num_available:
            return None
        while self._free.num_free < n:
            self._evict()
        page_ids = self._free.allocate(n)
        assert page_ids is not None
        for page in page_ids:
            self._num_references[page] = 1
        return page_ids

    def seal(self, page: int, key: bytes) -> None:
        """A private page is full and written. If another page has the key, this one stays private:
        its holder keeps it, and nobody else will find it."""
        if key not in self._sealed:
            self._sealed[key] = page
            self._key_of[page] = key

    def release(self, page_ids: Sequence[int]) -> None:
        """One holder less. `page_ids` are in the order of its tokens."""
        unreferenced: list[int] = []
        for page in reversed(page_ids):
            self._num_references[page] -= 1
            if self._num_references[page]:
                continue
            if self._key_of[page] is None:
                unreferenced.append(page)
            else:
                self._unused[page] = None
        self._free.free(unreferenced)

    def _evict(self) -> None:
        page, _ = self._unused.popitem(last=False)
        key = self._key_of[page]
        assert key is not None
        del self._sealed[key]
        self._key_of[page] = None
        self._free.free([page])

    def sealed_pages(self) -> dict[bytes, int]:
        """Key → page, of all that could be matched. For tests."""
        return dict(self._sealed)

    def is_private(self, page: int) -> bool:
        """Whether one holder references the page and may write to it."""
        return self._num_references[page] == 1 and self._key_of[page] is None

    def check(self, held: Iterable[int]) -> None:
        """Raises AssertionError unless every page is accounted for.

        Args:
          held: the pages of all holders, each as often as it is referenced.
        """
        references = Counter(held)
        counted = {page: n for page, n in enumerate(self._num_references) if n}
        assert counted == references, f"references are {counted}, holders have {references}"
        sealed = {page: key for page, key in enumerate(self._key_of) if key is not None}
        assert sealed == {page: key for key, page in self._sealed.items()}
        unused = sealed.keys() - references.keys()
        assert set(self._unused) == unused, "a sealed page is neither referenced nor unused"
        self._free.check([*references, *unused])
