"""Keys of full pages: which KV a page holds, as a hash over everything that decided it.

A page's KV depends on all tokens up to its end, so the key of page i is the hash of the key of page
i - 1 and the page's own tokens. The first page's parent stands for the salt: requests with
different salts never share a page. The hash is cryptographic, because whoever finds a collision
could be served another tenant's KV (vLLM left Python's `hash` for this reason, CVE-2025-25183).
"""

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Final

_DIGEST_BYTES: Final = 32


class PageKeys:
    """The keys of one growing sequence of tokens, computed no further than they are asked for."""

    def __init__(self, page_size: int, salt: str) -> None:
        self._page_size = page_size
        self._keys: list[bytes] = []
        self._root = blake2b(salt.encode(), digest_size=_DIGEST_BYTES, person=b"salt").digest()

    def up_to(self, num_pages: int, token_ids: Sequence[int]) -> Iterator[bytes]:
        """The keys of the first `num_pages` pages.

        Args:
          token_ids: the whole sequence; between calls it may only grow.
        """
        for page in range(num_pages):
            if page == len(self._keys):
                self._keys.append(self._key(page, token_ids))
            yield self._keys[page]

    def of(self, page: int, token_ids: Sequence[int]) -> bytes:
        """The key of one page; see `up_to`."""
        while len(self._keys) <= page:
            self._keys.append(self._key(len(self._keys), token_ids))
        return self._keys[page]

    def _key(self, page: int, token_ids: Sequence[int]) -> bytes:
        start = page * self._page_size
        tokens = array("i", token_ids[start : start + self._page_size])
        parent = self._keys[page - 1] if page else self._root
        return blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_BYTES).digest()
