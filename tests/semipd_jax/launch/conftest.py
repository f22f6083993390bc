import contextlib
from collections.abc import Iterator

import psutil
import pytest
from launch_rig import TESTS

from benchmarks.processes import engine_processes


@pytest.fixture(autouse=True)
def _fakes_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Processes that a test leaves are its fault, and no trouble of the next one."""
    yield
    left = engine_processes()
    for process in left.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(left.values()), timeout=60)
    assert not left
