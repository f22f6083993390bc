"""The state machine finds what it is there to find: each fault put in by hand makes it fail."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from scheduler_machine import Serving

from semipd_jax.paging.keys import PageKeys
from semipd_jax.paging.pool import PagePool
from semipd_jax.paging.quarantine import Quarantine
from semipd_jax.scheduler import decode, scheduler, wire
from semipd_jax.scheduler.order import rank
from semipd_jax.scheduler.prefill import plan_prefill
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import RowTable, SchedulerState
from semipd_jax.scheduler.watermark import Outlook


@seed(0)  # with which all are found soon
class Search(Serving):
    pass


SEARCH = settings(
    max_examples=600,
    stateful_step_count=30,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def key_without_parent(patch):
    def key(self, page, token_ids):
        start = page * self._page_size
        return b"%r" % token_ids[start : start + self._page_size]

    patch.setattr(PageKeys, "_key", key)


def key_without_salt(patch):
    patch.setattr(PageKeys, "__init__", _without_salt(PageKeys.__init__))


def key_of_fewer_tokens(patch):
    key = PageKeys._key
    patch.setattr(PageKeys, "_key", lambda self, page, ids: key(self, page, ids[: page * 4 + 3]))


def release_forgets_a_reference(patch):
    release = PagePool.release
    patch.setattr(PagePool, "release", lambda self, pages: release(self, pages[1:]))


def referenced_pages_stay_evictable(patch):
    def reference(self, pages):
        for page in pages:
            self._num_references[page] += 1

    patch.setattr(PagePool, "reference", reference)


def evicted_pages_keep_their_key(patch):
    def evict(self):
        page, _ = self._unused.popitem(last=False)
        self._key_of[page] = None
        self._free.free([page])

    patch.setattr(PagePool, "_evict", evict)


def second_seal_takes_the_key(patch):
    def seal(self, page, key):
        self._sealed[key] = page
        self._key_of[page] = key

    patch.setattr(PagePool, "seal", seal)


def sealed_pages_are_handed_out_before_free_ones(patch):
    def allocate(self, n):
        while self._sealed and self._free.num_free < n + 1:
            page = self._sealed.pop(next(iter(self._sealed)))
            self._key_of[page] = None
            self._unused.pop(page, None)
            self._free.free([page])
        return _allocate(self, n)

    _allocate = PagePool.allocate
    patch.setattr(PagePool, "allocate", allocate)


def pages_are_sealed_when_planned(patch):
    def next_prefill(self, **kwargs):
        if sent := _next_prefill(self, **kwargs):
            self._seal_pages(self.state.in_flight[sent.step.step_id])
        return sent

    _next_prefill = Scheduler.next_prefill
    patch.setattr(Scheduler, "next_prefill", next_prefill)


def a_page_is_sealed_one_token_early(patch):
    seal = Scheduler._seal_up_to
    patch.setattr(Scheduler, "_seal_up_to", lambda self, request, n: seal(self, request, n + 1))


def lost_steps_seal_pages(patch):
    def take_back(self, step):
        self._seal_pages(step)
        _take_back(self, step)

    _take_back = Scheduler._take_back
    patch.setattr(Scheduler, "_take_back", take_back)


def abandoned_steps_seal_pages(patch):
    def seal_pages(self, step):
        for chunk in step.chunks:
            self._seal_up_to(chunk.request, chunk.end)

    patch.setattr(Scheduler, "_seal_pages", seal_pages)


def the_whole_prompt_may_be_cached(patch):
    def cached_pages(self, request):
        num_pages = len(request.token_ids) // self.limits.page_size
        return self.pages.match(request.page_keys.up_to(num_pages, request.token_ids))

    patch.setattr(SchedulerState, "cached_pages", cached_pages)


def cached_pages_are_not_referenced(patch):
    patch.setattr(PagePool, "reference", lambda self, pages: None)


def the_row_does_not_get_the_cached_tokens(patch):
    patch.setattr(wire, "History", lambda row, token_ids: _History(row, b""))


def no_quarantine(patch):
    hold = Quarantine.hold
    patch.setattr(Quarantine, "hold", lambda self, pages, row, steps: hold(self, pages, row, []))
    patch.setattr(Scheduler, "_leave_row", _then_release(Scheduler._leave_row))


def quarantine_ends_with_the_first_step(patch):
    hold = Quarantine.hold
    patch.setattr(
        Quarantine, "hold", lambda self, pages, row, steps: hold(self, pages, row, [min(steps)])
    )


def pages_of_victims_in_flight_are_counted_on(patch):
    plan = decode._victims

    def victims(state, needy):
        chosen = plan(state, needy)
        for victim in chosen:
            victim.steps = _Falsy(victim.steps)
        return chosen

    patch.setattr(decode, "_victims", victims)


def the_queue_is_not_sorted(patch):
    def enqueue(self, request, rank):
        request.rank = rank
        self.waiting.append(request)

    patch.setattr(SchedulerState, "enqueue", enqueue)


def a_replanned_chunk_starts_too_late(patch):
    def take_back(self, step):
        _take_back(self, step)
        for chunk in step.chunks:
            if chunk.request.num_scheduled == chunk.start and chunk.end < chunk.start + 4:
                chunk.request.num_scheduled = chunk.end

    _take_back = Scheduler._take_back
    patch.setattr(Scheduler, "_take_back", take_back)


def admission_ignores_the_watermark(patch):
    patch.setattr(Outlook, "admits", lambda self, request, cached_pages: True)


def priorities_are_ignored(patch):
    def rank_by_arrival(request, num_to_compute, limits):
        return 0, *rank(request, num_to_compute, limits)[1:]

    patch.setattr(scheduler, "rank", rank_by_arrival)


def chunks_come_before_the_rows_that_decode(patch):
    def send(self, requests, *, joins=None, **parts):
        step_id = _send(self, requests, joins=joins, **parts)
        if joins is not None:
            step = self.state.in_flight[joins]
            step.requests[:] = [*requests, *step.requests[: -len(requests)]]
        return step_id

    _send = Scheduler._send
    patch.setattr(Scheduler, "_send", send)


def a_mixed_step_has_the_whole_budget_for_chunks(patch):
    def plan(state, *, max_tokens=None):
        return plan_prefill(state)

    patch.setattr(scheduler, "plan_prefill", plan)


def an_aborted_request_keeps_its_row(patch):
    def release(self, step_id):
        for page_ids, _ in self.state.quarantine.step_done(step_id):
            self.state.pages.release(page_ids)

    patch.setattr(Scheduler, "_release_quarantine", release)


class _History:
    def __init__(self, row, token_ids):
        self.row, self.token_ids = row, token_ids


class _Falsy(set):
    def __bool__(self):
        return False


def _without_salt(init: Callable) -> Callable:
    return lambda self, page_size, salt: init(self, page_size, "")


def _then_release(leave_row: Callable) -> Callable:
    def leave(self, request):
        leave_row(self, request)
        self._release_quarantine(-1)

    return leave


def rows_do_not_wait_for_masks(patch):
    def ready(self):
        rows = np.flatnonzero(self.active & (self.context_lens <= self.max_context_lens))
        return rows.astype(np.int32)

    patch.setattr(RowTable, "ready", ready)


def masks_are_not_sent(patch):
    patch.setattr(wire, "_masks", lambda *_: None)


def masks_outlive_their_token(patch):
    take = Scheduler._take_token

    def take_token(self, request, token, result, *, now_s):
        mask = request.constraint and request.constraint.mask
        take(self, request, token, result, now_s=now_s)
        if mask:
            request.constraint.mask = mask

    patch.setattr(Scheduler, "_take_token", take_token)


MUTANTS = [
    admission_ignores_the_watermark,
    priorities_are_ignored,
    chunks_come_before_the_rows_that_decode,
    a_mixed_step_has_the_whole_budget_for_chunks,
    an_aborted_request_keeps_its_row,
    rows_do_not_wait_for_masks,
    masks_are_not_sent,
    masks_outlive_their_token,
    key_without_parent,
    key_without_salt,
    key_of_fewer_tokens,
    release_forgets_a_reference,
    referenced_pages_stay_evictable,
    evicted_pages_keep_their_key,
    second_seal_takes_the_key,
    sealed_pages_are_handed_out_before_free_ones,
    pages_are_sealed_when_planned,
    a_page_is_sealed_one_token_early,
    lost_steps_seal_pages,
    abandoned_steps_seal_pages,
    the_whole_prompt_may_be_cached,
    cached_pages_are_not_referenced,
    the_row_does_not_get_the_cached_tokens,
    no_quarantine,
    quarantine_ends_with_the_first_step,
    pages_of_victims_in_flight_are_counted_on,
    the_queue_is_not_sorted,
    a_replanned_chunk_starts_too_late,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_state_machine_kills(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises((AssertionError, LookupError, ValueError)):
        run_state_machine_as_test(Search, settings=SEARCH)
