"""What the next prefill step computes: first come, first served, in chunks under a token budget."""

from itertools import islice

from semipd_jax.scheduler.state import Chunk, RequestState, SchedulerState, pages_for


def plan_prefill(state: SchedulerState) -> list[Chunk]:
    """Returns the chunks of the next step, in order; none if there is nothing to prefill or no
    room for it. Requests among them that are still waiting are to be admitted.

    Requests under way go first. A waiting one is admitted when its whole prompt fits beside what
    requests under way still need and one page for each decoding row, so that admissions do not
    take the pages that others are about to need. A suspect runs alone.
    """
    budget = state.limits.max_num_batched_tokens
    free = state.pages.num_free
    chunks: list[Chunk] = []
    for request in state.prefilling:
        chunk = _chunk(request, budget)
        if chunk is None:
            continue
        needed = _pages_short(state, request, chunk.end)
        if needed > free:
            return chunks
        if state.table.is_suspect[request.row]:
            return chunks or [chunk]
        chunks.append(chunk)
        budget -= chunk.end - chunk.start
        free -= needed
    return chunks + _admissions(state, budget)


def _admissions(state: SchedulerState, budget: int) -> list[Chunk]:
    reserved = int(state.table.active.sum()) + sum(
        _pages_short(state, r, len(r.token_ids)) for r in state.prefilling
    )
    chunks: list[Chunk] = []
    for request in islice(state.waiting, len(state.free_rows)):
        needed = pages_for(len(request.token_ids), state.limits.page_size)
        chunk = _chunk(request, budget)
        if chunk is None or needed + reserved > state.pages.num_free:
            break
        chunks.append(chunk)
        budget -= chunk.end - chunk.start
        reserved += needed
    return chunks


def _chunk(request: RequestState, budget: int) -> Chunk | None:
    """The request's next tokens, or None if all were sent or the budget is used up."""
    start, target = request.num_scheduled, len(request.token_ids)
    end = min(target, start + budget)
    return Chunk(request, start, end, samples=end == target) if end > start else None


def _pages_short(state: SchedulerState, request: RequestState, num_tokens: int) -> int:
    return max(0, pages_for(num_tokens, state.limits.page_size) - len(request.page_ids))
