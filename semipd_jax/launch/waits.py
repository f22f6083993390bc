"""Waits that let the main thread see every signal.

Python cannot wake a thread for a signal that comes just before it begins to wait, so that these
wake by themselves now and then.
"""

import contextlib
import math
import queue
import threading
import time
from typing import Final

_WAKE_S: Final = 0.5


def until_set(event: threading.Event, timeout_s: float = math.inf) -> bool:
    """False if the event is not set in time."""
    deadline_s = time.monotonic() + timeout_s
    while not event.wait(max(min(deadline_s - time.monotonic(), _WAKE_S), 0.0)):
        if time.monotonic() >= deadline_s:
            return False
    return True


def take[T](items: "queue.SimpleQueue[T]") -> T:
    """The next item, as soon as there is one."""
    while True:
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=_WAKE_S)
