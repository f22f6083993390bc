"""How `serve` ends: drains at the first signal, and ends at once at the second."""

import queue
import threading
from typing import Any

import pytest

from semipd_jax import serve
from semipd_jax.config import EngineConfig, ModelConfig
from semipd_jax.launch.launcher import Launcher

TIMEOUT_S = 60.0


class FakeLauncher(Launcher):
    """Draining or stopping takes until it is allowed to end, or everything is killed."""

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
