"""Requests come, go and are aborted while devices run steps late, and die and run again.

After every move all invariants are computed anew (`SchedulerState.check` and those here), and what
each request gets must be what it would get alone.
"""

import functools
import itertools
import random
from collections import Counter, deque

import numpy as np
from fake_device import extended
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_cases import (
    MAX_LEN,
    PAGE_SIZE,
    Outcome,
    constraint_of,
    expected,
    make_mask,
    make_prompt,
    make_request,
    make_scheduler,
    run_to_end,
)

from semipd_jax.config import LANES
from semipd_jax.coordinator.coordinator import DEPTH
from semipd_jax.messages import DecodeStep, PrefillStep, ToWorker, parts
from semipd_jax.paging.keys import PageKeys
from semipd_jax.request import FinishReason, Request
from semipd_jax.scheduler.lanes import next_step
from semipd_jax.scheduler.state import RequestState, pages_for

_LONG_PROMPT = st.tuples(st.integers(1, 18), st.integers(1, 8))
_LONG_OUTPUT = st.tuples(st.integers(1, 6), st.integers(10, 20))
"""(prompt, output) tokens; the latter grow until there are no pages left."""


class Serving(RuleBasedStateMachine):
    @initialize(
        num_pages=st.sampled_from([7, 8, 9, 10, 12, 24]),
        num_rows=st.integers(3, 6),
        budget=st.integers(1, 24),
        policy=st.sampled_from(["fcfs", "spf"]),
        caching=st.sampled_from([True, True, True, False]),
        mode=st.sampled_from(["semi-pd", "semi-pd", "colocated", "chunked"]),
        drains_deep=st.booleans(),
    )
    def start(self, num_pages, num_rows, budget, policy, caching, mode, drains_deep):
        self.scheduler, self.device = make_scheduler(
            num_pages=num_pages,
            num_rows=num_rows,
            budget=budget,
            policy=policy,
            ageing_tokens_per_s=2.0,
            enable_prefix_caching=caching,
        )
        self.drains_deep = drains_deep
        self.queues = {lane: deque() for lane in LANES[mode]}
        self.unmasked: list[RequestState] = []
        self.requests: dict[int, Request] = {}
        self.states = []
        self.num_learnt = Counter()
        self.handles = itertools.count()
        self.outcome = Outcome()
        self.now = 0.0
        self.meaning: dict[bytes, tuple[str, tuple[int, ...]]] = {}
        self.times_allocated = Counter()
        self.allocate = self.scheduler.state.pages.allocate
        self.scheduler.state.pages.allocate = self._allocate
        self.sent_with: dict[int, dict[int, int]] = {}

    @rule(
        lengths=st.lists(st.one_of(_LONG_PROMPT, _LONG_OUTPUT), min_size=1, max_size=4),
        kind=st.integers(0, 2),
        seed=st.integers(0, 2**32 - 1),
        salt=st.sampled_from(["", "", "other tenant"]),
        priority=st.sampled_from([0, 0, 1]),
        client=st.sampled_from(["c", "c", "other"]),
    )
    def submit(self, lengths, kind, seed, salt, priority, client):
        for prompt_len, max_tokens in lengths:
            prompt = make_prompt(prompt_len, kind)
            fields = {"seed": seed, "stop": [seed % 50], "cache_salt": salt, "priority": priority}
            fields["constrained"] = seed % 3 == 2
            request = make_request(prompt, min(max_tokens, MAX_LEN - prompt_len), **fields)
            self._submit(request, client)

    @precondition(lambda self: self.outcome.tokens)
    @rule(data=st.data(), max_tokens=st.integers(1, 4))
    def submit_next_turn(self, data, max_tokens):
        """The prompt is another request's, with what it generated so far."""
        handle = data.draw(st.sampled_from(sorted(self.outcome.tokens)))
        last = self.requests[handle]
        prompt = (*last.prompt_token_ids, *self.outcome.tokens[handle])[: MAX_LEN - max_tokens]
        self._submit(make_request(prompt, max_tokens, seed=handle, cache_salt=last.cache_salt))

    def _submit(self, request: Request, client: str = "c") -> None:
        handle = next(self.handles)
        self.now += 1.0
        constraint = constraint_of(request)
        submit = functools.partial(self.scheduler.submit, constraint=constraint)
        assert submit(client, handle, request, now_s=self.now) is None
        self.requests[handle] = request
        self.states.append(self.scheduler.state.requests[client, handle])

    @rule(
        num_moves=st.integers(1, 30),
        eagerness=st.sampled_from([0.5, 0.7, 0.9]),
        seed=st.integers(0, 2**16),
        drains=st.sampled_from([*[False] * 9, True]),
        misfortune=st.sampled_from([0.0, 0.0, 0.1]),
    )
    def serve(self, num_moves, eagerness, seed, drains, misfortune):
        """Steps are planned and answered in random order; the eager plan more than is answered. The
        unfortunate lose workers and requests all the time."""
        rng = random.Random(seed)
        for _ in range(num_moves):
            lane = rng.choice(list(self.queues))
            if rng.random() < misfortune:
                self._lose(lane, rng.randrange(3))
            elif rng.random() < misfortune and (running := self._running()):
                self._abort(*rng.choice(running))
            elif self.unmasked and rng.random() < 0.3:
                self._make_mask(rng.randrange(len(self.unmasked)))
            elif rng.random() > eagerness:
                self._answer(lane)
            elif len(self.queues[lane]) < DEPTH:
                self._plan(lane)
            self.check()
        if drains:
            self.drain()

    def _plan(self, lane) -> bool:
        sent = next_step(self.scheduler, lane, now_s=0.0)
        if sent is None:
            return False
        if sent.admitted:
            self._check_room()
        self._check_budget(sent.step)
        self.queues[lane].append(sent.step)
        pages = _named_pages(sent.step)
        self.sent_with[sent.step.step_id] = {page: self.times_allocated[page] for page in pages}
        return True

    def _answer(self, lane):
        if self.queues[lane]:
            reply = self.device.run(self.queues[lane].popleft())
            result = self.scheduler.step_done(reply, now_s=0.0)
            self.outcome.take(result)
            self.unmasked += [token.request for token in result.unmasked]

    def _make_mask(self, i):
        self.outcome.take(make_mask(self.scheduler, self.unmasked.pop(i)))

    def _allocate(self, n):
        pages = self.allocate(n)
        self.times_allocated.update(pages or [])
        return pages

    @rule(data=st.data(), ran=st.integers(0, 2))
    def lose_worker(self, data, ran):
        """Some of its steps had run, unanswered; all of them are planned again."""
        self._lose(data.draw(st.sampled_from(sorted(self.queues))), ran)

    def _lose(self, lane, ran):
        queue = self.queues[lane]
        for step in list(queue)[:ran]:
            self.device.run(step)
        steps = [step.step_id for step in queue]
        queue.clear()
        self.outcome.take(self.scheduler.worker_lost(steps, now_s=0.0))

    @precondition(lambda self: self._running())
    @rule(data=st.data(), whole_client=st.sampled_from([False, False, False, True]))
    def abort(self, data, whole_client):
        """A request, or all of a client that is gone."""
        client, handle = data.draw(st.sampled_from(self._running()))
        if whole_client:
            self.outcome.take(self.scheduler.abort_client(client, now_s=0.0))
        else:
            self._abort(client, handle)

    def _abort(self, client, handle):
        self.outcome.take(self.scheduler.abort(client, handle, FinishReason.ABORT, now_s=0.0))

    def drain(self):
        """Everything runs to its end, one step at a time or as the coordinator does it, and nothing
        of it is left."""
        if self.drains_deep:
            self._run_deep()
        for lane in self.queues:
            while self.queues[lane]:
                self._answer(lane)
        while self.unmasked:
            self._make_mask(0)
        run_to_end(self.scheduler, self.device, self.outcome, lanes=self.queues)
        assert set(self.outcome.endings) == set(self.requests), "no answer"
        state = self.scheduler.state
        assert state.pages.num_available == state.limits.num_pages - 1

    def _run_deep(self):
        """Each lane has up to `DEPTH` steps in flight until there is nothing left to run."""
        for _ in range(5000):
            for lane, queue in self.queues.items():
                while len(queue) < DEPTH and self._plan(lane):
                    pass
            if not any(self.queues.values()) and not self.unmasked:
                return
            self.check()
            for lane in self.queues:
                self._answer(lane)
            while self.unmasked:
                self._make_mask(0)
        raise AssertionError("it runs for ever")

    @invariant()
    def holds(self):
        if hasattr(self, "scheduler"):
            self.check()

    def check(self):
        state = self.scheduler.state
        state.check()
        priorities = [request.request.priority for request in state.waiting]
        assert priorities == sorted(priorities), "somebody more important waits longer"
        for step in itertools.chain(*self.queues.values()):
            self._check_in_flight(step)
        self._learn_keys()
        for key, page in state.pages.sealed_pages().items():
            self._check_sealed(page, *self.meaning[key])

    def _check_room(self):
        """All that are being prefilled will find room, as things are, unless there is but one."""
        state = self.scheduler.state
        missing = [
            max(0, pages_for(len(request.token_ids), PAGE_SIZE) - len(request.page_ids))
            for request in state.prefilling
        ]
        is_alone = len(state.prefilling) + len(state.decoding) == 1
        assert is_alone or sum(missing) <= state.pages.num_available, "too many are admitted"

    def _check_budget(self, step):
        """Decode leaves a mixed step what it does not take of the budget."""
        num_rows = sum(len(p.rows) // 4 for p in parts(step) if isinstance(p, DecodeStep))
        prompt = sum(len(p.token_ids) // 4 for p in parts(step) if isinstance(p, PrefillStep))
        most = self.scheduler.state.limits.max_num_batched_tokens
        assert prompt <= max(0, most - num_rows), "a step is over its budget"

    def _check_in_flight(self, step):
        """What it names is neither free nor given to others; what it writes nobody else reads."""
        state, pages = self.scheduler.state, self.sent_with[step.step_id]
        assert state.pages.num_unreferenced(pages) == 0, "a step in flight names a free page"
        assert pages == {page: self.times_allocated[page] for page in pages}, "a page was reused"
        rows = [row for part in parts(step) for row in _ints(part.rows)]
        assert len(rows) == len(set(rows)), "a request is twice in a step"
        assert not set(rows) & set(state.free_rows)
        written = _written_pages(step)
        assert len(written) == len(set(written)), "a page has two writers"
        assert all(map(state.pages.is_private, written))

    def _check_sealed(self, page, salt, tokens):
        """It holds the KV of the tokens that its key stands for, and nobody with another salt
        reads it."""
        assert self.device.kv[page].tolist() == list(tokens[-PAGE_SIZE:])
        prefixes = list(itertools.accumulate(tokens, extended, initial=0))
        assert self.device.prefix[page].tolist() == prefixes[-PAGE_SIZE:]
        for request in self.scheduler.state.requests.values():
            assert page not in request.page_ids or request.request.cache_salt == salt

    def _learn_keys(self) -> None:
        """What each key stands for, found without the pool."""
        for i, state in enumerate(self.states):
            tokens, salt = state.token_ids, state.request.cache_salt
            if len(tokens) // PAGE_SIZE == self.num_learnt[i]:
                continue
            self.num_learnt[i] = len(tokens) // PAGE_SIZE
            keys = PageKeys(PAGE_SIZE, salt).up_to(self.num_learnt[i], tokens)
            for end, key in enumerate(keys, 1):
                meaning = salt, tuple(tokens[: end * PAGE_SIZE])
                assert self.meaning.setdefault(key, meaning) == meaning, "one key, two meanings"

    def _running(self) -> list[tuple[str, int]]:
        return sorted(self.scheduler.state.requests)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        self.drain()
        for handle, request in self.requests.items():
            tokens, reason = expected(request)
            got, ending = self.outcome.tokens.get(handle, []), self.outcome.endings.get(handle)
            if ending is None or ending.reason is FinishReason.ABORT:
                assert got == tokens[: len(got)]
            else:
                assert (got, ending.reason) == (tokens, reason)


def _ints(array: bytes) -> list[int]:
    return np.frombuffer(array, np.int32).tolist()


def _named_pages(step: ToWorker) -> set[int]:
    return {page for part in parts(step) for page in _ints(part.page_table)} - {0}


def _written_pages(step: ToWorker) -> list[int]:
    """Once for each request that writes it."""
    pages: list[int] = []
    for part in parts(step):
        ends = _ints(part.context_lens)
        table = np.frombuffer(part.page_table, np.int32).reshape(len(ends), -1)
        new = [1] * len(ends)
        if isinstance(part, PrefillStep):
            new = np.diff(np.frombuffer(part.cu_q_lens, np.int32)).tolist()
        for i, (n, end) in enumerate(zip(new, ends, strict=True)):
            pages += {int(table[i, p // PAGE_SIZE]) for p in range(end - n, end)}
    return pages
