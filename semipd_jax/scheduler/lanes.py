"""What each lane runs next: a phase of its own, or both in one worker's way."""

from semipd_jax.config import Lane
from semipd_jax.messages import DecodeStep, MixedStep, PrefillStep
from semipd_jax.scheduler.decode import needs_pages
from semipd_jax.scheduler.scheduler import Scheduler, Sent

type NextStep = Sent[PrefillStep] | Sent[DecodeStep] | Sent[MixedStep] | None


def next_step(scheduler: Scheduler, lane: Lane, *, now_s: float) -> NextStep:
    """Plans, applies and returns a lane's next step, or None if there is none to run."""
    match lane:
        case "prefill":
            return scheduler.next_prefill(now_s=now_s)
        case "decode":
            return scheduler.next_decode()
        case "colocated":
            return _next_of_one_phase(scheduler, now_s=now_s)
        case "chunked":
            return _next_mixed(scheduler, now_s=now_s)


def _next_of_one_phase(scheduler: Scheduler, *, now_s: float) -> NextStep:
    """Prefill first. But while pages are scarce (requests were preempted lately) those rows come
    first that need some: prefill would take what was given up for them, and give it up again, for
    ever."""
    if scheduler.state.growth_share > 0 and needs_pages(scheduler.state):
        return scheduler.next_decode() or scheduler.next_prefill(now_s=now_s)
    return scheduler.next_prefill(now_s=now_s) or scheduler.next_decode()


def _next_mixed(scheduler: Scheduler, *, now_s: float) -> NextStep:
    """All rows that can advance, and chunks of prompts for the rest of the token budget.

    A request that is suspected of killing workers must run alone: while there is one, steps are not
    mixed.
    """
    state = scheduler.state
    if any(request.is_suspect for request in state.requests.values()):
        return scheduler.next_prefill(now_s=now_s) or scheduler.next_decode()
    decode = scheduler.next_decode()
    if decode is None:
        return scheduler.next_prefill(now_s=now_s)
    left = max(0, state.limits.max_num_batched_tokens - len(decode.step.rows) // 4)
    prefill = scheduler.next_prefill(now_s=now_s, max_tokens=left, joins=decode.step.step_id)
    if prefill is None:
        return decode
    return Sent(MixedStep(decode.step, prefill.step), prefill.admitted)
