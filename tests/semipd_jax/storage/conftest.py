import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from semipd_jax.storage.cpu import HostMemory
from semipd_jax.storage.server import MemoryServer


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    tmp_path.chmod(0o700)
    return str(tmp_path)


@contextlib.contextmanager
def _answering(answer: Callable[[], None], times: int = 1) -> Iterator[None]:
    """Answers processes on a thread."""

    def answer_all() -> None:
        for _ in range(times):
            answer()

    thread = threading.Thread(target=answer_all, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


@contextlib.contextmanager
def _serving(run_dir: str, *memories: HostMemory, times: int = 1) -> Iterator[None]:
    """A memory owner that answers so many processes."""
    with (
        contextlib.closing(MemoryServer(run_dir, memories)) as server,
        _answering(server.answer, times),
    ):
        yield


@pytest.fixture
def answering() -> Callable[..., AbstractContextManager[None]]:
    return _answering


@pytest.fixture
def serving() -> Callable[..., AbstractContextManager[None]]:
    return _serving
