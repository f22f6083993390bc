"""The library: what happens when it is used in unforeseen ways."""

import _thread
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import psutil
import pytest

from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import Engine
from semipd_jax.errors import InvalidRequestError, UnavailableError

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def small(compile_cache):
    with Engine(
        str(MODEL_DIR),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_num_queued_reqs=4,
        compile_cache_dir=compile_cache,
    ) as engine:
        yield engine


def wait_until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while (stats := engine.stats()).num_running or stats.num_waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)


def test_more_prompts_than_the_queue_holds(small):
    results = small.generate_many([[5, 6, 7 + i] for i in range(40)], max_tokens=3, ignore_eos=True)
    assert [len(r.token_ids) for r in results] == [3] * 40


def test_a_bad_prompt_among_many_ends_the_others(small):
    with pytest.raises(InvalidRequestError, match="empty"):
        small.generate_many([PROMPT, PROMPT, []], max_tokens=1500, ignore_eos=True)
    wait_until_idle(small)


def test_a_stream_that_is_left_ends_its_request(small):
    for _ in small.stream(PROMPT, max_tokens=1500, ignore_eos=True):
        break
    wait_until_idle(small)


def test_after_stop_everything_says_so(compile_cache):
    with Engine(
        str(MODEL_DIR), max_num_seqs=4, max_num_batched_tokens=64, compile_cache_dir=compile_cache
    ) as engine:
        stream = engine.stream(PROMPT, max_tokens=1500, ignore_eos=True)
        next(stream)
        engine.stop()
        engine.stop()
        with pytest.raises(UnavailableError, match="stopped"):
            engine.generate(PROMPT)
        stream.close()


@pytest.mark.usefixtures("interruptible")
def test_a_signal_that_wakes_no_thread_interrupts_nevertheless(small):
    """As one does that comes just before the thread begins to wait."""
    before = small.stats().num_output_tokens

    def interrupt():
        deadline = time.monotonic() + 60
        while not small.stats().num_running and time.monotonic() < deadline:
            time.sleep(0.02)
        _thread.interrupt_main()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        small.generate(PROMPT, max_tokens=2000, ignore_eos=True)
    interrupter.join()
    wait_until_idle(small)
    assert small.stats().num_output_tokens - before < 2000


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_interrupt_while_a_request_is_handed_over_ends_it(small, monkeypatch, has_begun):
    hand_over = small._loop.call_soon_threadsafe
    before = small.stats().num_output_tokens

    def interrupted(callback):
        hand_over(callback)
        monkeypatch.undo()
        if has_begun:
            small.stats()
        raise KeyboardInterrupt

    monkeypatch.setattr(small._loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.generate(PROMPT, max_tokens=2000, ignore_eos=True)
    wait_until_idle(small)
    assert small.stats().num_output_tokens - before < 2000


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Of garbage, unless a test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_stream_that_the_engine_s_own_thread_collects_ends_its_request(small, no_collection):
    stream = small.stream(PROMPT, max_tokens=2000, ignore_eos=True)
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    before = small.stats().num_output_tokens
    del stream, cycle
    small._loop.call_soon_threadsafe(gc.collect)
    asked_s = time.monotonic()
    wait_until_idle(small)
    assert time.monotonic() - asked_s < 30
    assert small.stats().num_output_tokens - before < 2000


class Mark:
    """Of a frame."""


def mark_of_failure(call: Callable[[], object]) -> weakref.ref[Mark]:
    mark = Mark()
    try:
        call()
    except InvalidRequestError:
        return weakref.ref(mark)
    raise AssertionError


@pytest.mark.parametrize("how", ["generate", "generate_many", "stream"])
def test_a_call_that_fails_leaves_no_garbage(small, no_collection, how):
    calls = {
        "generate": lambda: small.generate([]),
        "generate_many": lambda: small.generate_many([PROMPT, [], PROMPT], max_tokens=9),
        "stream": lambda: list(small.stream([])),
    }
    mark = mark_of_failure(calls[how])
    deadline = time.monotonic() + 10
    while mark() is not None:  # the loop's thread may be a little late to let go of it
        assert time.monotonic() < deadline
        time.sleep(0.02)


SLOW_TYPES = """
import sys, threading, time

def hook(event, args):
    in_thread = threading.current_thread() is not threading.main_thread()
    if in_thread and event == "object.__setattr__" and "jaxlib" in str(args[0]):
        time.sleep(5)

sys.addaudithook(hook)
"""


def test_workers_start_wherever_python_switches_between_threads(
    compile_cache, tmp_path, monkeypatch
):
    """Libraries install audit hooks. They let threads switch within calls into jax, such as those
    that make a type when it is needed for the first time, and are lost if two threads do so."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_TYPES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    with Engine(str(MODEL_DIR), compile_cache_dir=compile_cache, **small) as engine:
        assert len(engine.generate(PROMPT, max_tokens=2, ignore_eos=True).token_ids) == 2


@pytest.mark.parametrize("how", ["forgotten", "collected", "ctrl-c"])
def test_a_program_that_ends_leaves_nothing(compile_cache, how):
    """Also if the engine's own thread has collected it."""
    code = """
import gc, signal, sys, time
from semipd_jax import Engine
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what they run in &
small = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
engine = Engine(sys.argv[1], compile_cache_dir=sys.argv[2], **small)
stream = engine.stream([5, 6, 7], max_tokens=1500, ignore_eos=True)
next(stream)
print(engine._engine._launcher.run_dir, flush=True)
if sys.argv[3] == "collected":
    gc.disable()
    loop, cycle = engine._loop, [engine, stream]
    cycle.append(cycle)
    del engine, stream, cycle
    loop.call_soon_threadsafe(gc.collect)
    while not loop.is_closed():
        time.sleep(0.02)
while sys.argv[3] == "ctrl-c":
    engine.generate([5, 6, 7], max_tokens=2000, ignore_eos=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(MODEL_DIR), compile_cache, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            assert program.stdout is not None
            run_dir = program.stdout.readline().strip()
            assert run_dir
            family = psutil.Process(program.pid).children(recursive=True) if how == "ctrl-c" else []
            if how == "ctrl-c":
                program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=120)
        finally:
            program.kill()
        assert program.returncode == (-signal.SIGINT if how == "ctrl-c" else 0), errors
    assert "Task was destroyed" not in errors
    assert "Traceback" not in errors or how == "ctrl-c", errors
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert not os.path.exists(run_dir)
