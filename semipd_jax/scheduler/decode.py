"""Which rows the next decode step advances, which get a page, and who gives way if none is free."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from semipd_jax.scheduler.order import preemption_rank
from semipd_jax.scheduler.state import RequestState, SchedulerState, ints


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """`grow` are the rows among `rows` that take one more page; `victims` are preempted first."""

    rows: Int32[np.ndarray, " B"]
    grow: list[int]
    victims: list[RequestState]


def plan_decode(state: SchedulerState) -> DecodePlan | None:
    """Returns the next step, or None if no row can advance.

    Every decoding row advances by one token unless it lacks a page. Pages go to the most important
    rows first, then to the oldest; the others wait for pages in quarantine, and if these are too
    few, requests are preempted until the need is met. Suspects run alone, one by one.

    A constrained row takes part when the mask for its next token is there, which needs its last
    one. When all that could advance are such, they wait for the step in flight, or they would
    split into two halves that take turns for ever.
    """
    table = state.table
    rows = table.ready()
    if rows.size == 0:
        return None
    if state.is_decoding and table.is_constrained[rows].all():
        return None
    suspects = rows[table.is_suspect[rows]]
    if suspects.size:
        rows = suspects[:1]
    short = _short(state, rows)
    if short.size <= state.pages.num_available:
        return DecodePlan(rows.astype(np.int32), ints(short), [])
    return _plan_under_pressure(state, rows, short)


def needs_pages(state: SchedulerState) -> bool:
    """Whether the next step would take pages."""
    return _short(state, state.table.ready()).size > 0


def _short(state: SchedulerState, rows: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " short"]:
    """Those of the rows whose next step takes one more page."""
    capacity = state.table.num_pages[rows] * state.limits.page_size
    return rows[state.table.context_lens[rows] > capacity]


def _plan_under_pressure(
    state: SchedulerState, rows: np.ndarray, short: np.ndarray
) -> DecodePlan | None:
    requests = state.table.requests
    needy: list[RequestState] = sorted(
        (r for row in ints(short) if (r := requests[row]) is not None),
        key=lambda r: (r.request.priority, r.admitted_at),
    )
    victims = _victims(state, needy)
    gone = {v.row for v in victims}
    # Pages of victims with steps in flight go to quarantine first: do not count on them.
    at_once = [page for v in victims if not v.steps for page in v.page_ids]
    free = state.pages.num_available + state.pages.num_exclusive(at_once)
    grow = [r.row for r in needy if r.row not in gone][:free]
    stalled = {r.row for r in needy} - set(grow)
    advancing = [row for row in ints(rows) if row not in gone and row not in stalled]
    if not advancing and not victims:
        return None
    return DecodePlan(np.array(advancing, np.int32), grow, victims)


def _victims(state: SchedulerState, needy: list[RequestState]) -> list[RequestState]:
    """Who gives way, until what they alone hold, with what is in quarantine, covers what the
    remaining needy rows lack."""
    victims: list[RequestState] = []
    coming, need = state.pages.num_available + state.num_quarantined_pages, len(needy)
    if coming >= need:
        return victims
    holders = [*state.decoding, *state.prefilling]
    holders.sort(key=lambda r: preemption_rank(r, state), reverse=True)
    while coming < need and len(holders) > 1:
        victim = holders.pop()
        victims.append(victim)
        coming += state.pages.num_exclusive(victim.page_ids)
        need -= victim in needy
    return victims
