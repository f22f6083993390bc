"""How many pages new requests may take, so that running ones can grow without preempting anybody.

Every running request keeps a claim on the pages that it will take soon: those of its prompt, one
more, and those for a share of all that it may still generate. Most requests end long before their
limit, so the share starts at 0; each preemption raises it, and it is forgotten over the next few
hundred decode steps (SGLang's new-token ratio). Under a load that does not fit, admissions thus
become cautious until preemptions are rare, whatever the lengths are.
"""

from typing import Final

import numpy as np

from semipd_jax.scheduler.state import RequestState, SchedulerState, pages_for

_RAISE: Final = 0.2
_STEPS_TO_FORGET: Final = 600


def share_after_preemption(share: float) -> float:
    return min(1.0, share + _RAISE)


def share_after_step(share: float) -> float:
    return max(0.0, share - _RAISE / _STEPS_TO_FORGET)


def claim(request: RequestState, state: SchedulerState) -> int:
    """Pages, in all, that a request with its whole prompt to compute keeps a claim on."""
    page_size, num_tokens = state.limits.page_size, len(request.token_ids)
    growth = max(page_size, int(state.growth_share * (request.max_len - num_tokens)))
    return pages_for(min(request.max_len, num_tokens + growth), page_size)


def room(state: SchedulerState) -> int:
    """Available pages that no running request has a claim on; negative if they claim more."""
    table, page_size = state.table, state.limits.page_size
    rows = np.flatnonzero(table.active)
    num_tokens, most = table.context_lens[rows] - 1, table.max_context_lens[rows]
    growth = np.maximum(page_size, (state.growth_share * (most - num_tokens)).astype(np.int32))
    claims = -(-np.minimum(most, num_tokens + growth) // page_size) - table.num_pages[rows]
    decoding = int(np.maximum(claims, 0).sum())
    prefilling = sum(max(0, claim(r, state) - len(r.page_ids)) for r in state.prefilling)
    return state.pages.num_available - decoding - prefilling
