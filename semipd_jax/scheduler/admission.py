"""Which requests the queue takes."""

from semipd_jax.request import Request
from semipd_jax.scheduler.state import SchedulerState


def refusal(request: Request, state: SchedulerState) -> str | None:
    """Why the queue does not take one more request now, or None if it does.

    A prompt longer than the limit of tokens is taken when there are no others.
    """
    limits = state.limits
    if len(state.waiting) >= limits.max_num_queued_reqs:
        most = limits.max_num_queued_reqs
        return f"{most} requests are waiting already, the most allowed; try again"
    if limits.max_num_queued_tokens is None:
        return None
    queued = sum(len(r.token_ids) for r in state.waiting)
    queued += sum(len(r.token_ids) - r.num_scheduled for r in state.prefilling)
    if queued and queued + len(request.prompt_token_ids) > limits.max_num_queued_tokens:
        return (
            f"{queued} prompt tokens are waiting already, and {limits.max_num_queued_tokens} is "
            "the most allowed with this request's; try again"
        )
    return None
