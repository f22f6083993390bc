import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from semipd_jax.paging.pool import PagePool

A, B, C = (bytes([i]) * 32 for i in range(3))


def sealed(pool: PagePool, *keys: bytes) -> list[int]:
    """Pages under these keys, referenced once."""
    pages = pool.allocate(len(keys))
    assert pages is not None
    for page, key in zip(pages, keys, strict=True):
        pool.seal(page, key)
    return pages


def test_a_released_prefix_is_found_again_and_shared():
    pool = PagePool(8)
    pages = sealed(pool, A, B)
    assert pool.match([A, B, C]) == pages
    pool.release(pages)
    assert pool.num_available == 7
    assert pool.match([A, B, C]) == pages
    assert pool.num_unreferenced(pages) == 2
    for holders in (1, 2):
        pool.reference(pages)
        pool.check(pages * holders)
    assert pool.num_available == 5
    assert pool.num_exclusive(pages) == 0
    assert pool.num_exclusive(pages * 2) == 2, "of both holders"
    pool.release(pages)
    assert pool.num_exclusive(pages) == 2


def test_a_gap_ends_the_match():
    pool = PagePool(8)
    sealed(pool, A, C)
    assert len(pool.match([A, B, C])) == 1
    assert pool.match([B, C]) == []


def test_pages_that_were_not_sealed_are_free_at_once():
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert pages is not None
    pool.release(pages)
    pool.check([])
    assert (pool.num_available, pool.num_sealed) == (3, 0)


def test_the_least_recently_used_goes_first_and_ends_go_before_beginnings():
    pool = PagePool(5)
    old, young = sealed(pool, A, B), sealed(pool, C)
    pool.release(old)
    pool.release(young)
    pool.reference(pool.match([A]))
    pool.release(pool.match([A]))  # used again: now the youngest
    assert pool.allocate(2) is not None  # one is free
    assert (pool.match([A]), pool.match([B]), pool.match([C])) == (old[:1], [], young)
    assert pool.allocate(1) is not None
    assert (pool.match([A]), pool.match([C])) == (old[:1], [])


def test_what_is_referenced_is_never_given_up():
    pool = PagePool(4)
    pages = sealed(pool, A, B)
    assert pool.allocate(2) is None
    assert pool.num_available == 1
    assert pool.match([A, B]) == pages


def test_a_second_page_with_the_same_key_stays_private():
    pool = PagePool(4)
    first, second = sealed(pool, A), sealed(pool, A)
    assert pool.match([A]) == first
    assert pool.is_private(second[0])
    pool.release(second)
    pool.check(first)
    assert pool.num_available == 2


def test_shared_first_counts_leading_pages_only():
    pool = PagePool(8)
    pages = [*sealed(pool, A, B), *sealed(pool, C)]
    pool.reference(pages[:1])
    pool.reference(pages[2:])
    assert pool.num_leading_shared(pages) == 1
    assert pool.num_exclusive(pages) == 1


@pytest.mark.parametrize("held", [[1], [1, 2, 2], [1, 2, 3]])
def test_check_sees_wrong_references(held):
    pool = PagePool(5)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="references"):
        pool.check(held)


class Pool(RuleBasedStateMachine):
    """Holders of pages against a plain model: what each page was sealed with, who holds what."""

    @initialize(num_pages=st.integers(2, 8))
    def start(self, num_pages):
        self.pool = PagePool(num_pages)
        self.holders: list[list[int]] = []
        self.contents: dict[int, bytes] = {}

    @rule(n=st.integers(0, 4))
    def allocate(self, n):
        held = {page for pages in self.holders for page in pages}
        available = self.pool.num_available
        pages = self.pool.allocate(n)
        assert (pages is None) == (n > available)
        if pages is not None:
            assert not held & set(pages)
            for page in pages:
                assert self.pool.is_private(page)
                self.contents.pop(page, None)
            self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), key=st.integers(0, 5))
    def seal(self, data, key):
        pages = [p for p in data.draw(st.sampled_from(self.holders)) if self.pool.is_private(p)]
        if pages:
            page = data.draw(st.sampled_from(pages))
            self.pool.seal(page, bytes([key]))
            if not self.pool.is_private(page):
                self.contents[page] = bytes([key])

    @rule(keys=st.lists(st.integers(0, 5), unique=True, max_size=4))
    def reuse(self, keys):
        wanted = [bytes([key]) for key in keys]
        pages = self.pool.match(wanted)
        assert [self.contents[page] for page in pages] == wanted[: len(pages)]
        before, unused = self.pool.num_available, self.pool.num_unreferenced(pages)
        self.pool.reference(pages)
        assert self.pool.num_available == before - unused
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data):
        pages = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(pages)

    @invariant()
    def accounted_for(self):
        if hasattr(self, "pool"):
            held = [page for pages in self.holders for page in pages]
            self.pool.check(held)
            assert self.pool.num_available == self.pool._free.num_pages - 1 - len(set(held))


Pool.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestPoolAgainstAModel = Pool.TestCase
