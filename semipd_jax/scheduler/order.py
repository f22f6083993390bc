"""Who is prefilled first, and who gives way when there are no pages left.

Lower priorities come first. Within one, `fcfs` is the order of arrival; `spf` takes the shortest
remainder first, because that lowers the mean time to first token (Nexus, arXiv 2507.06608, finds
that it moves it more than compute shares do), and lets requests age: after w seconds of waiting, n
tokens to compute count as n - w * ageing_tokens_per_s. Since everybody ages alike, this is the
order of arrival + n / ageing_tokens_per_s, which does not change while a request waits. So one
with n tokens to compute is never passed by what arrives n / ageing_tokens_per_s seconds after it.
"""

from semipd_jax.scheduler.state import Limits, Rank, RequestState, SchedulerState


def rank(request: RequestState, num_to_compute: int, limits: Limits) -> Rank:
    """Sorts requests with so many tokens to compute; never equal for two requests."""
    due_s = 0.0
    if limits.policy == "spf":
        due_s = request.arrival_s + num_to_compute / limits.ageing_tokens_per_s
    return request.request.priority, due_s, request.number


def num_to_recompute(request: RequestState, state: SchedulerState) -> int:
    """What preempting a running request wastes: its tokens with KV, but for the first ones whose
    pages others hold too. Its own pages stay cached only until their space is needed, which is
    why it would be preempted."""
    shared = state.pages.num_leading_shared(request.page_ids)
    return max(0, request.num_scheduled - shared * state.limits.page_size)


def _num_to_await(request: RequestState, state: SchedulerState) -> int:
    """Prompt tokens of the steps in flight that its pages come back after."""
    steps = (state.in_flight[step_id] for step_id in request.steps)
    return sum(chunk.end - chunk.start for step in steps for chunk in step.chunks)


def preemption_rank(request: RequestState, state: SchedulerState) -> tuple[int, int, int]:
    """Sorts running requests by who gives way first: the least important, then the cheapest, by
    the prompt tokens that decode waits for and that are computed again, then the youngest."""
    cost = num_to_recompute(request, state) + _num_to_await(request, state)
    return -request.request.priority, cost, -request.admitted_at
