"""A launcher whose memory owner and workers are fakes without jax, and a client of its engine."""

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from fake_device import next_token

from semipd_jax.config import EngineConfig, ModelConfig, ShareConfig, TimeoutConfig
from semipd_jax.launch.launcher import Launcher, Modules
from semipd_jax.messages import (
    FromCoordinator,
    Outputs,
    Partition,
    PartitionReply,
    SetPartition,
    Submit,
    ToCoordinator,
)
from semipd_jax.request import Request, SamplingParams
from semipd_jax.transport.channels import CLIENTS, Link

FAKES = Modules(owner="fake_owner", worker="fake_worker")
TESTS = Path(__file__).parent


def config(*, shares: ShareConfig | None = None, **timeouts: float) -> EngineConfig:
    times = {"startup_s": 120.0, "step_s": 60.0, **timeouts}
    return EngineConfig(
        model=ModelConfig(path="none"),
        timeouts=TimeoutConfig(**times),
        shares=shares or ShareConfig(),
    )


def wait_until(condition, *, timeout_s: float = 60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def concurrently[T](call: Callable[[], T]) -> Future[T]:
    """What the call returns or raises; one that hangs may be left behind."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextmanager
def unwoken_signal(
    is_waiting: Callable[[], object], signum: signal.Signals = signal.SIGINT
) -> Iterator[None]:
    """Inside, the main thread gets a signal as soon as `is_waiting()`, and nothing wakes it: as
    when the signal comes just before it begins to wait. It is to leave within seconds."""
    has_left, is_late = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        wait_until(is_waiting)
        _thread.interrupt_main(signum)
        if not has_left.wait(5.0):
            is_late.set()
            signal.pthread_kill(main, signum)  # this one wakes it

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what is in `&`
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        has_left.set()
        sender.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not is_late.is_set(), "the signal was noticed when another one came"


class Client:
    def __init__(self, launcher: Launcher) -> None:
        self._link = Link[FromCoordinator, ToCoordinator](
            launcher.run_dir, CLIENTS, "test", FromCoordinator
        )

    def generate(self, handle: int, *, max_tokens: int, on_token=lambda n: None) -> list[int]:
        prompt = (5, 6, handle)
        sampling = SamplingParams(max_tokens=max_tokens, seed=handle)
        request = Request(request_id=str(handle), prompt_token_ids=prompt, sampling=sampling)
        self._link.send(Submit(handle, request))
        tokens: list[int] = []
        while True:
            message = self._link.receive(60.0)
            assert message is not None, "no answer"
            if isinstance(message, Outputs):
                new = np.frombuffer(message.token_ids, np.int32).tolist()
                tokens += new
                if new:
                    on_token(len(tokens))
                if message.done:
                    assert message.done[0].error is None
                    return tokens

    def shares(self, **shares: float) -> Partition:
        """After a change to those given. Only while nothing is generated."""
        self._link.send(SetPartition(1, **shares))
        report = self._link.receive(60.0)
        assert isinstance(report, PartitionReply)
        return report.partition

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()


def expected(handle: int, max_tokens: int) -> list[int]:
    output: list[int] = []
    while len(output) < max_tokens:
        output.append(next_token([5, 6, handle, *output], handle))
    return output
