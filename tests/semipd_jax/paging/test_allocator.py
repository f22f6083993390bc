import random

import pytest

from semipd_jax.paging.allocator import PageAllocator
from semipd_jax.paging.quarantine import Quarantine


def test_random_allocate_and_free_never_leaks():
    rng = random.Random(0)
    allocator, held = PageAllocator(num_pages=16), []
    for _ in range(1000):
        if held and rng.random() < 0.5:
            allocator.free(held.pop(rng.randrange(len(held))))
        elif pages := allocator.allocate(rng.randint(1, 5)):
            held.append(pages)
        allocator.check(page for pages in held for page in pages)


def test_refused_allocation_takes_nothing():
    allocator = PageAllocator(num_pages=3)
    assert allocator.allocate(3) is None
    assert allocator.num_free == 2


def test_check_sees_a_leak_and_a_double_hold():
    allocator = PageAllocator(num_pages=4)
    pages = allocator.allocate(2)
    assert pages is not None
    with pytest.raises(AssertionError, match="leaked"):
        allocator.check(pages[:1])
    with pytest.raises(AssertionError, match="twice"):
        allocator.check([*pages, pages[0]])


def test_quarantine_releases_after_the_last_step_that_names_the_pages():
    quarantine = Quarantine()
    quarantine.hold([4, 5], row=1, step_ids=[7, 8])
    quarantine.hold([6], row=2, step_ids=[8])
    assert quarantine.step_done(7) == []
    assert quarantine.page_ids == [4, 5, 6]
    assert quarantine.step_done(8) == [([4, 5], 1), ([6], 2)]
    assert quarantine.page_ids == []
