"""How many requests may run, so that they can grow without preempting each other.

Admission looks ahead: every running request is expected to generate so many more tokens and then
to give its pages back, and a new one is admitted if at each of these moments all pages that are in
use by then fit into the pool (the past-future scheduler, arXiv 2507.10150). What is expected is a
share of what a request may still generate, and one page at least. Most requests end long before
their limit, so the share starts at 0; each preemption raises it, and it is forgotten over the next
few hundred decode steps, as SGLang does with its new-token ratio. Who names no limit may generate
as much as the model can, which says nothing about what it will: a share is taken of `_MOST_LEFT`
at most, SGLang's number too. Under a load that does not fit, preemptions are thus rare, whatever
the lengths are, and few pages lie idle for it.
"""

from typing import Final

import numpy as np
from jaxtyping import Int32

from semipd_jax.scheduler.state import RequestState, SchedulerState, ints, pages_for

_RAISE: Final = 0.2
_STEPS_TO_FORGET: Final = 600
_MOST_LEFT: Final = 4096  # tokens


def share_after_preemption(share: float) -> float:
    return min(1.0, share + _RAISE)


def share_after_step(share: float) -> float:
    return max(0.0, share - _RAISE / _STEPS_TO_FORGET)


class Outlook:
    """What running requests will need, with those admitted since.

    Of each: how many tokens it may add to its KV, how many of them its pages have room for, and how
    many pages come back when it ends: those that others computed, or hold too, are taken to outlive
    it.
    """

    def __init__(self, state: SchedulerState) -> None:
        table, page_size = state.table, state.limits.page_size
        rows = np.flatnonzero(table.active)
        num_tokens = table.context_lens[rows] - 1
        self._state = state
        self._available = state.pages.num_available
        self._left = ints(table.max_context_lens[rows] - num_tokens)
        self._slack = ints(-num_tokens % page_size)
        self._num_pages = ints(table.num_pages[rows])
        self._num_shared = ints(table.num_shared_pages[rows])
        self._rows = [*ints(rows), *(request.row for request in state.prefilling)]
        for request in state.prefilling:
            num_shared = int(table.num_shared_pages[request.row])
            self._add(request, num_shared, len(request.page_ids))

    def admits(self, request: RequestState, cached_pages: list[int]) -> bool:
        """Whether a waiting request fits too; if so, it counts from now on. One that would run
        alone always does."""
        is_alone = not self._left
        self._share(cached_pages)
        self._add(request, len(cached_pages), len(cached_pages))
        self._available -= self._state.pages.num_unreferenced(cached_pages)
        return is_alone or self._peak() <= self._available

    def _share(self, page_ids: list[int]) -> None:
        common = self._state.table.num_common(page_ids)[self._rows]
        for i in ints(common.nonzero()[0]):
            self._num_shared[i] = max(self._num_shared[i], int(common[i]))

    def _add(self, request: RequestState, num_shared: int, num_held: int) -> None:
        num_tokens, page_size = len(request.token_ids), self._state.limits.page_size
        num_pages = pages_for(num_tokens, page_size)
        self._available -= max(0, num_pages - num_held)
        self._left.append(request.max_len - 1 - num_tokens)
        self._slack.append(-num_tokens % page_size)
        self._num_pages.append(num_pages)
        self._num_shared.append(num_shared)

    def _peak(self) -> int:
        columns = (self._left, self._slack, self._num_pages, self._num_shared)
        left, slack, num_pages, num_shared = (np.array(column, np.int32) for column in columns)
        page_size, share = self._state.limits.page_size, self._state.growth_share
        expected = (share * np.minimum(left, _MOST_LEFT)).astype(np.int32)
        growth = np.minimum(left, np.maximum(page_size, expected))
        return peak_pages(growth, slack, num_pages - num_shared, page_size)


def peak_pages(
    growth: Int32[np.ndarray, " n"],
    slack: Int32[np.ndarray, " n"],
    own: Int32[np.ndarray, " n"],
    page_size: int,
) -> int:
    """Most pages that requests will ever take beside those in use now, if all grow at one pace.

    Usage peaks when one of them ends: those that end before it have given their pages back, the
    others have grown as much as it has.

    Args:
      growth: tokens that each adds before it ends.
      slack: how many of them its pages have room for, below `page_size`.
      own: pages of it that come back when it ends, beside those that it grows into.
    """
    order = np.argsort(-growth, stable=True)
    growth, slack, own = growth[order], slack[order], own[order]
    whole, rest = np.divmod(growth, page_size)
    # [i, n]: of the first i + 1 requests, those that n more tokens would take a page for.
    overflowing = np.cumsum(slack[:, None] < np.arange(page_size)[None, :], axis=0)
    index = np.arange(len(order))
    taken = (index + 1) * whole + overflowing[index, rest]
    given_back = own.sum() - np.cumsum(own)
    return int((taken - given_back).max())
