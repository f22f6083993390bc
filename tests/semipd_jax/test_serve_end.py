"""How `serve` ends: drains at the first signal, and ends at once at the second."""

import queue
import signal
import threading
from typing import Any

import pytest
from launch_rig import unwoken_signal, wait_until

from semipd_jax import serve
from semipd_jax.config import EngineConfig, ModelConfig
from semipd_jax.launch.launcher import Launcher
from semipd_server.settings import Settings

TIMEOUT_S = 60.0


class FakeLauncher(Launcher):
    """One of the things it does takes until it is allowed to end, or everything is killed."""

    def __init__(self, slow: str) -> None:
        super().__init__(EngineConfig(model=ModelConfig(path="absent")))
        self.done: list[str] = []
        self._slow = slow
        self._go_on = threading.Event()
        self.is_slow = threading.Event()

    def _do(self, what: str) -> None:
        if what == self._slow:
            self.is_slow.set()
            assert self._go_on.wait(TIMEOUT_S)
        self.done.append(what)

    def start(self) -> Any:
        self._do("start")

    def drain(self) -> None:
        self._do("drain")

    def stop(self) -> None:
        self._do("stop")

    def kill(self) -> None:
        self.done.append("kill")
        self._go_on.set()

    def go_on(self) -> None:
        self._go_on.set()


def end(launcher: FakeLauncher, events: "queue.SimpleQueue[Any]") -> threading.Thread:
    ending = threading.Thread(target=lambda: serve._end(launcher, events), daemon=True)
    ending.start()
    return ending


def test_one_signal_drains_then_stops():
    launcher = FakeLauncher(slow="")
    end(launcher, queue.SimpleQueue()).join(TIMEOUT_S)
    assert launcher.done == ["drain", "stop"]


@pytest.mark.parametrize("slow", ["drain", "stop"])
def test_the_second_signal_ends_everything_now(slow: str):
    launcher, events = FakeLauncher(slow), queue.SimpleQueue[Any]()
    ending = end(launcher, events)
    assert launcher.is_slow.wait(TIMEOUT_S)
    assert "kill" not in launcher.done
    events.put("signal")
    ending.join(TIMEOUT_S)
    assert not ending.is_alive()
    assert "kill" in launcher.done


def test_a_failure_while_draining_is_no_signal():
    launcher, events = FakeLauncher("drain"), queue.SimpleQueue[Any]()
    ending = end(launcher, events)
    assert launcher.is_slow.wait(TIMEOUT_S)
    events.put("ended")
    launcher.go_on()
    ending.join(TIMEOUT_S)
    assert launcher.done == ["drain", "stop"]


@pytest.mark.parametrize("slow", ["start", ""], ids=["while it starts", "while it serves"])
def test_a_signal_that_wakes_no_thread_is_heard(
    slow: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    launcher, announced = FakeLauncher(slow), threading.Event()
    monkeypatch.setattr(serve, "Launcher", lambda *_, **__: launcher)
    monkeypatch.setattr(serve, "_announce", lambda *_: announced.set())
    caplog.set_level("INFO", "semipd_jax.serve")

    def is_waiting() -> bool:
        return launcher.is_slow.is_set() or "control socket" in caplog.text

    with unwoken_signal(is_waiting, signal.SIGTERM):
        assert serve._serve(EngineConfig(model=ModelConfig(path="absent")), Settings()) == 0
    assert launcher.done[-2:] == ["drain", "stop"]
    launcher.go_on()
    wait_until(announced.is_set)
