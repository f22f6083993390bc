"""Python code that ends in time: an exception is sent into the thread that runs it."""

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Final

_AGAIN_S: Final = 0.1
_send: Final = ctypes.pythonapi["PyThreadState_SetAsyncExc"]
_send.argtypes = (ctypes.c_ulong, ctypes.py_object)
_take_back: Final = ctypes.pythonapi["PyThreadState_SetAsyncExc"]
_take_back.argtypes = (ctypes.c_ulong, ctypes.c_void_p)


class _Over(BaseException):
    """No `except Exception` of the code stops it. It is sent again until the code has ended."""


@dataclass(slots=True, eq=False)
class _Call:
    """
    Attributes:
      fire_s: when its thread gets `_Over` next, on the clock `time.monotonic`.
    """

    thread_id: int
    fire_s: float


class Deadlines:
    """For the calls of all threads. One thread more, from the first call on, watches over them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._calls: set[_Call] = set()
        self._wake_s = inf
        self._watch = threading.Thread(target=self._run, name="deadlines", daemon=True)

    def within[T](self, timeout_s: float, work: Callable[[], T]) -> T:
        """What `work` returns. Its thread looks for the exception between two steps of the
        interpreter: one that takes long, such as a product of texts, is not cut short.

        Raises:
          TimeoutError: `work` took longer than `timeout_s`.
          Exception: whatever `work` raises.
        """
        call = _Call(threading.get_ident(), time.monotonic() + timeout_s)
        try:
            with self._lock:
                self._add(call)
            return work()
        except _Over:
            raise TimeoutError from None
        finally:
            # The interpreter looks for sent exceptions where functions begin and return and where
            # loops go back: not from here on until `_take_back` has left none that could arrive.
            with self._lock:
                _take_back(call.thread_id, None)
                self._calls.discard(call)

    def _add(self, call: _Call) -> None:
        if not self._watch.is_alive():
            self._watch.start()
        self._calls.add(call)
        if call.fire_s < self._wake_s:
            self._wake_s = call.fire_s
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._lock:
                now_s = time.monotonic()
                for call in self._calls:
                    if call.fire_s <= now_s:
                        _send(call.thread_id, _Over)
                        call.fire_s = now_s + _AGAIN_S
                self._wake_s = min((call.fire_s for call in self._calls), default=inf)
                self._changed.wait(min(self._wake_s - now_s, threading.TIMEOUT_MAX))
