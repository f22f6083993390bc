"""Which requests the queue takes."""

from semipd_jax.scheduler.state import RequestState, SchedulerState


def refusal(request: RequestState, state: SchedulerState) -> str | None:
    """Why the queue does not take one more request now, or None if it does.

    Tokens whose KV is cached do not count. A prompt longer than the limit of tokens is taken when
    there are no others.
    """
    limits = state.limits
    if len(state.waiting) >= limits.max_num_queued_reqs:
        most = limits.max_num_queued_reqs
        return f"{most} requests are waiting already, the most allowed; try again"
    if limits.max_num_queued_tokens is None:
        return None
    queued = sum(len(r.token_ids) - state.num_found(r) for r in state.waiting)
    queued += sum(len(r.token_ids) - r.num_scheduled for r in state.prefilling)
    room = limits.max_num_queued_tokens - queued
    if not queued or request.num_prompt <= room:
        return None
    num_cached = len(state.cached_pages(request)) * limits.page_size
    if request.num_prompt - num_cached <= room:
        return None
    return (
        f"{queued} prompt tokens are waiting already, and {limits.max_num_queued_tokens} is "
        "the most allowed with this request's; try again"
    )
