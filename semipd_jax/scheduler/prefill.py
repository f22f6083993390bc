"""What the next prefill step computes: requests in order, in chunks under a token budget."""

from collections.abc import Iterator
from heapq import merge
from itertools import islice

from semipd_jax.scheduler.order import rank
from semipd_jax.scheduler.state import Chunk, RequestState, SchedulerState, Stage, pages_for
from semipd_jax.scheduler.watermark import Outlook


def plan_prefill(state: SchedulerState, *, max_tokens: int | None = None) -> list[Chunk]:
    """Returns the chunks of the next step, in order; none if there is nothing to prefill or no
    room for it. Requests among them that are still waiting are to be admitted.

    A waiting request is admitted when there will be room for it (`scheduler.watermark`). One that
    does not fit is not passed by others that wait, or it might wait for ever; requests under way
    go on. A suspect runs alone. One that was preempted while its mask is made waits for it.

    Args:
      max_tokens: the chunk budget of this step, if it is not that of the limits.
    """
    if not state.prefilling and not state.waiting:
        return []
    budget = state.limits.max_num_batched_tokens if max_tokens is None else max_tokens
    free = state.pages.num_available
    outlook = Outlook(state) if state.waiting and state.free_rows else None
    chunks: list[Chunk] = []
    for request in in_order(state):
        waits = request.stage is Stage.WAITING
        if budget == 0:
            break
        if waits and (outlook is None or request.lacks_mask):
            outlook = None
            continue
        chunk = _chunk(request, budget, state)
        needed = _pages_needed(chunk, state)
        is_admitted = not waits or (outlook and outlook.admits(request, chunk.cached_pages))
        if needed > free or not is_admitted:
            outlook = None
            continue
        if request.is_suspect:
            return chunks or [chunk]
        chunks.append(chunk)
        budget -= chunk.end - chunk.start
        free -= needed
    return chunks


def in_order(state: SchedulerState) -> Iterator[RequestState]:
    """Requests with tokens to send, and as many of the waiting ones as there are rows."""
    limits = state.limits

    def current_rank(request: RequestState) -> tuple[int, float, int]:
        if request.stage is Stage.WAITING:
            return request.rank
        return rank(request, len(request.token_ids) - request.num_scheduled, limits)

    under_way = [r for r in state.prefilling if r.num_scheduled < len(r.token_ids)]
    waiting = islice(state.waiting, len(state.free_rows))
    return merge(sorted(under_way, key=current_rank), waiting, key=current_rank)


def _pages_needed(chunk: Chunk, state: SchedulerState) -> int:
    """Available pages that the chunk takes, cached ones that nobody holds included."""
    held = len(chunk.cached_pages) + len(chunk.request.page_ids)
    missing = max(0, pages_for(chunk.end, state.limits.page_size) - held)
    return missing + state.pages.num_unreferenced(chunk.cached_pages)


def _chunk(request: RequestState, budget: int, state: SchedulerState) -> Chunk:
    """The request's next tokens, as many as the budget allows."""
    cached: list[int] = []
    start, target = request.num_scheduled, len(request.token_ids)
    if request.stage is Stage.WAITING:
        cached = state.cached_pages(request)
        start = len(cached) * state.limits.page_size
    end = min(target, start + budget)
    return Chunk(request, start, end, end == target, cached)
