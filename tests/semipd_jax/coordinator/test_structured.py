"""Constrained requests among others: when they are queued, and in which steps they take part."""

import functools
import itertools
import select
import threading

import numpy as np
import pytest
from coordinator_rig import Engine, expected
from tiny_tokenizers import byte_level_bpe

from semipd_jax.coordinator.structured import Compiled, GrammarThreads, Masked
from semipd_jax.grammar.grammars import Grammars
from semipd_jax.messages import Abort, GetStats, Refused, SetSlo, Slo, Stats
from semipd_jax.request import FinishReason, Request, SamplingParams, StructuredOutputs
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Limits

FORM = "x"  # any: see `coordinator_rig.FakeGrammars`


@pytest.fixture
def engine() -> Engine:
    engine = Engine()
    engine.start_workers()
    return engine


def rows_of(step) -> list[int]:
    return np.frombuffer(step.rows, np.int32).tolist()


def start(engine: Engine, *handles: int, regex: str | None = None, **options) -> dict:
    """Submits and prefills."""
    requests = {h: engine.submit(h, regex=regex, **options) for h in handles}
    engine.coordinator.masks_made()
    while engine.queue("prefill-1"):
        engine.answer("prefill-1")
    return requests


def test_constrained_and_free_requests_get_their_tokens(engine):
    requests = start(engine, 1, 2, max_tokens=9) | start(
        engine, 3, 4, 5, 6, regex=FORM, max_tokens=18
    )
    engine.run()
    tokens, done = engine.received()
    assert tokens == {h: expected(r) for h, r in requests.items()}
    reasons = {h: done[h].reason for h in requests}
    assert {h for h, r in requests.items() if len(tokens[h]) < r.sampling.max_tokens} == {
        h for h, reason in reasons.items() if reason is FinishReason.STOP
    }
    assert FinishReason.STOP in reasons.values(), "no output ended where its form does"
    assert all(d.stop_token_id is None for d in done.values())


def test_a_row_is_not_in_a_step_before_the_last_of_its_tokens_is_back(engine):
    start(engine, 1, max_tokens=20)
    start(engine, 2, regex=FORM, max_tokens=20)
    row = next(r.row for r in engine.scheduler.state.requests.values() if r.constraint is not None)
    took_part = []
    for _ in range(8):
        step = engine.queue("decode-1")[0]
        took_part.append(row in rows_of(step))
        assert (step.masks is not None) == took_part[-1]
        engine.answer("decode-1")
        engine.scheduler.state.check()
    assert sum(took_part) >= 3, "its mask was there, but the next plan did not take it"
    assert not any(a and b for a, b in itertools.pairwise(took_part))


def test_constrained_rows_alone_stay_in_one_batch(engine):
    start(engine, 1, regex=FORM, max_tokens=20)
    engine.answer("decode-1")
    start(engine, 2, regex=FORM, max_tokens=20)
    for _ in range(2):
        assert len(engine.queue("decode-1")) == 1
        engine.answer("decode-1")
    assert len(rows_of(engine.queue("decode-1")[0])) == 2


def test_a_late_mask_holds_up_nobody_else(engine):
    engine.grammars.late = {2}
    free = start(engine, 1, max_tokens=12)
    late = start(engine, 2, regex=FORM, max_tokens=12)
    engine.grammars.release()
    engine.coordinator.masks_made()  # its grammar
    engine.run()
    tokens, done = engine.received()
    assert tokens[1] == expected(free[1])
    assert 1 in done
    assert len(tokens[2]) == 1
    while 2 not in engine.received()[1]:
        engine.grammars.release()
        engine.coordinator.masks_made()
        engine.run()
    assert engine.received()[0][2] == expected(late[2])


def test_a_worker_that_dies_with_a_constrained_row_changes_no_token(engine):
    requests = start(engine, 1, 2, regex=FORM, max_tokens=9) | start(engine, 3, max_tokens=9)
    engine.device.run(engine.queue("decode-1")[0])  # it ran, the answer was lost
    engine.queue("decode-1").clear()
    engine.coordinator.worker_lost("decode", "decode-1")
    engine.scheduler.state.check()
    engine.start_workers(2)
    engine.run(2)
    assert engine.received()[0] == {h: expected(r) for h, r in requests.items()}


def stats_of(engine: Engine) -> Stats:
    engine.coordinator.from_client("c", GetStats(7))
    return engine.clients.messages["c"][-1]


def test_a_wrong_form_is_refused_by_field(engine):
    engine.submit(1, regex="(")
    engine.coordinator.masks_made()
    assert list(engine.clients.messages["c"]) == [
        Refused(1, "unclosed", "structured_outputs.regex")
    ]
    assert stats_of(engine).slo.num_ended == 0, "the client's fault is no missed promise"


def test_without_grammars_forms_are_refused():
    engine = Engine(has_grammars=False)
    engine.submit(1, regex=FORM)
    [refused] = engine.clients.messages["c"]
    assert refused.field == "structured_outputs"


def test_an_abort_while_the_grammar_is_compiled_is_answered_once(engine):
    engine.grammars.late = {1}
    engine.submit(1, regex=FORM)
    assert (stats_of(engine).num_waiting, stats_of(engine).num_running) == (1, 0)
    assert engine.grammars.wanted[1]()
    engine.coordinator.from_client("c", Abort(1))
    assert not engine.grammars.wanted[1]()
    assert stats_of(engine).num_waiting == 0
    engine.grammars.release()
    engine.coordinator.masks_made()
    engine.run()
    tokens, done = engine.received()
    assert tokens == {}
    assert done[1].reason is FinishReason.ABORT
    assert not engine.scheduler.state.requests


def test_who_leaves_while_the_grammar_is_compiled_counts_once_the_promise_is_broken(engine):
    engine.coordinator.from_client("c", SetSlo(7, Slo(ttft_ms=500.0)))
    engine.grammars.late = {1, 2}
    for handle, waited_s, num_missed in ((1, 0.4, 0), (2, 0.6, 1)):
        engine.submit(handle, regex=FORM)
        engine.now += waited_s
        engine.coordinator.from_client("c", Abort(handle))
        counts = stats_of(engine).slo
        assert (counts.num_ended, counts.num_met) == (num_missed, 0)


def test_the_grammars_of_a_client_that_vanished_are_not_wanted(engine):
    engine.grammars.late = {1, 2}
    engine.submit(1, regex=FORM)
    engine.submit(2, regex=FORM, client="gone")
    engine.submit(3, client="gone")
    engine.clients.unreachable = {"gone"}
    engine.run()
    assert [engine.grammars.wanted[handle]() for handle in (1, 2)] == [True, False]


@pytest.mark.parametrize(("waited_s", "num_missed"), [(0.4, 0), (0.6, 2)])
def test_grammars_of_a_client_that_vanished_count_once_the_promise_is_broken(
    engine, waited_s, num_missed
):
    """As they do if it leaves: see above. The other one is queued."""
    engine.coordinator.from_client("c", SetSlo(7, Slo(ttft_ms=500.0)))
    engine.grammars.late = {1}
    engine.submit(1, regex=FORM, client="gone")
    engine.submit(2, client="gone")
    engine.now += waited_s
    engine.clients.unreachable = {"gone"}
    engine.run()
    stats = stats_of(engine)
    assert (stats.slo.num_ended, stats.slo.num_met, stats.num_waiting) == (num_missed, 0, 0)


def test_grammars_that_are_compiled_are_bounded_in_number(engine):
    most = engine.scheduler.state.limits.max_num_queued_reqs
    engine.grammars.late = set(range(most))
    for handle in range(most + 1):
        engine.submit(handle, regex=FORM)
    [refused] = engine.clients.messages["c"]
    assert (refused.handle, refused.field) == (most, "")
    stats = stats_of(engine)
    assert (stats.num_waiting, stats.slo.num_ended, stats.slo.num_met) == (most, 1, 0)


# ---------------------------------------------------------------- the threads

TOKENIZER = byte_level_bpe()
GRAMMARS = Grammars(TOKENIZER.to_str(), 400, (1,))


def always_wanted() -> bool:
    return True


def constrained(regex: str) -> Request:
    form = StructuredOutputs(regex=regex)
    sampling = SamplingParams(structured_outputs=form, max_tokens=5, stop_token_ids=(1,))
    return Request(request_id="r", prompt_token_ids=(5,), sampling=sampling)


def state_of(compiled: Compiled):
    """The request as the scheduler keeps it."""
    limits = Limits(
        page_size=4, num_pages=9, num_rows=3, max_model_len=32, max_num_batched_tokens=16,
        max_num_queued_reqs=4,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    scheduler.submit("c", 1, compiled.request, now_s=0.0, constraint=compiled.constraint)
    return scheduler.state.requests["c", 1]


def wait_for(threads: GrammarThreads):
    assert select.select([threads.fileno()], [], [], 60)[0]
    [made] = threads.take()
    assert not select.select([threads.fileno()], [], [], 0)[0]
    return made


def test_threads_compile_and_advance():
    threads = GrammarThreads(GRAMMARS)
    threads.compile("c", 1, constrained("ab"), always_wanted)
    compiled = wait_for(threads)
    assert isinstance(compiled, Compiled)
    request = state_of(compiled)
    threads.advance(request, TOKENIZER.token_to_id("a"))
    [masked] = threads.take(wait_s=60.0)
    assert isinstance(masked, Masked)
    bits = np.unpackbits(np.frombuffer(masked.mask, np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [TOKENIZER.token_to_id("b")]
    threads.advance(request, TOKENIZER.token_to_id("b"))
    assert threads.take(wait_s=60.0) == [Masked(request, None)]


def test_threads_report_what_they_cannot_do():
    threads = GrammarThreads(GRAMMARS)
    threads.compile("c", 1, constrained("("), always_wanted)
    refused = wait_for(threads)
    assert refused.constraint is None
    assert refused.field == "structured_outputs.regex"
    assert "unclosed group" in refused.error
    threads.compile("c", 1, constrained("ab"), always_wanted)
    request = state_of(wait_for(threads))
    threads.advance(request, TOKENIZER.token_to_id("b"))
    [masked] = threads.take(wait_s=60.0)
    assert masked.mask is None
    assert "form of the output" in masked.error


def test_what_nobody_waits_for_any_more_is_not_compiled(monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    matcher = Grammars.matcher

    def slow_matcher(self, sampling):
        begun.set()
        assert go_on.wait(60)
        return matcher(self, sampling)

    monkeypatch.setattr(Grammars, "matcher", slow_matcher)
    threads = GrammarThreads(GRAMMARS)
    wanted = {1, 2, 3}
    for handle in (1, 2, 3):
        is_wanted = functools.partial(wanted.__contains__, handle)
        threads.compile("c", handle, constrained("ab"), is_wanted)
    assert begun.wait(60)
    wanted -= {1, 2}  # the first is under way
    go_on.set()
    done = []
    while 3 not in done:
        assert select.select([threads.fileno()], [], [], 60)[0]
        done += [made.handle for made in threads.take()]
    assert done == [1, 3]


def test_the_loop_does_not_wait_for_a_slow_mask():
    threads = GrammarThreads(GRAMMARS)
    threads.compile("c", 1, constrained("ab"), always_wanted)
    request = state_of(wait_for(threads))
    matcher, go_on = request.constraint.matcher, threading.Event()
    accept = matcher.accept
    matcher.accept = lambda token_id: (go_on.wait(60), accept(token_id))
    threads.advance(request, TOKENIZER.token_to_id("a"))
    assert threads.take(wait_s=0.001) == []
    go_on.set()
    assert wait_for(threads).mask is not None


def test_the_loop_does_not_wait_for_a_slow_grammar(monkeypatch):
    go_on, matcher = threading.Event(), Grammars.matcher
    monkeypatch.setattr(Grammars, "matcher", lambda *args: (go_on.wait(60), matcher(*args))[1])
    threads = GrammarThreads(GRAMMARS)
    threads.compile("c", 1, constrained("ab"), always_wanted)
    assert not go_on.is_set()
    assert threads.take() == []
    go_on.set()
    assert wait_for(threads).constraint is not None


def test_a_panic_is_an_error_of_one_request(monkeypatch):
    class Panic(BaseException):
        pass

    def panic(self, sampling):
        raise Panic("index out of bounds")

    threads = GrammarThreads(GRAMMARS)
    monkeypatch.setattr(Grammars, "matcher", panic)
    threads.compile("c", 1, constrained("ab"), always_wanted)
    assert "index out of bounds" in wait_for(threads).error
    monkeypatch.undo()
    threads.compile("c", 1, constrained("ab"), always_wanted)
    assert wait_for(threads).constraint is not None
