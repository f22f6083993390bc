"""What the next prefill step computes: requests in order, in chunks under a token budget."""

from collections.abc import Iterator
from heapq import merge
from itertools import islice

from semipd_jax.scheduler.order import rank
from semipd_jax.scheduler.state import Chunk, RequestState, SchedulerState, Stage, pages_for
from semipd_jax.scheduler.watermark import claim, room


def plan_prefill(state: SchedulerState, *, max_tokens: int | None = None) -> list[Chunk]:
    """Returns the chunks of the next step, in order; none if there is nothing to prefill or no
    room for it. Requests among them that are still waiting are to be admitted.

    A waiting request is admitted when its claim (`scheduler.watermark`) fits beside those of the
    running ones. One that does not fit is not passed by others that wait, or it might wait for
    ever; requests under way have their pages and go on. A suspect runs alone.

    Args:
      max_tokens: the chunk budget of this step, if it is not that of the limits.
    """
    budget = state.limits.max_num_batched_tokens if max_tokens is None else max_tokens
    free = state.pages.num_available
    left = room(state) if state.waiting and state.free_rows else -1
    chunks: list[Chunk] = []
    for request in _in_order(state):
        waits = request.stage is Stage.WAITING
        if budget == 0:
            break
        if waits and left < 0:
            continue
        chunk = _chunk(request, budget, state)
        unused = state.pages.num_unreferenced(chunk.cached_pages)
        held = len(chunk.cached_pages) if waits else len(request.page_ids)
        if waits:
            left -= claim(request, state) - held + unused
            if left < 0:
                continue
        needed = max(0, pages_for(chunk.end, state.limits.page_size) - held) + unused
        if needed > free:
            continue  # decode has grown into its pages and will give them back
        if request.is_suspect:
            return chunks or [chunk]
        chunks.append(chunk)
        budget -= chunk.end - chunk.start
        free -= needed
    return chunks


def _in_order(state: SchedulerState) -> Iterator[RequestState]:
    """Requests with tokens to send, and as many of the waiting ones as there are rows."""
    limits = state.limits

    def current_rank(request: RequestState) -> tuple[int, float, int]:
        if request.stage is Stage.WAITING:
            return request.rank
        return rank(request, len(request.token_ids) - request.num_scheduled, limits)

    under_way = [r for r in state.prefilling if r.num_scheduled < len(r.token_ids)]
    waiting = islice(state.waiting, len(state.free_rows))
    return merge(sorted(under_way, key=current_rank), waiting, key=current_rank)


def _chunk(request: RequestState, budget: int, state: SchedulerState) -> Chunk:
    """The request's next tokens, as many as the budget allows."""
    cached: list[int] = []
    start, target = request.num_scheduled, len(request.token_ids)
    if request.stage is Stage.WAITING:
        cached = state.cached_pages(request)
        start = len(cached) * state.limits.page_size
    end = min(target, start + budget)
    return Chunk(request, start, end, end == target, cached)
