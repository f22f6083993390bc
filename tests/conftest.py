import logging
import os
import signal
from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, here and in children

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The first example may compile, and the machine may stall. In CI the default draws the same
# examples every time.
settings.register_profile(
    "semipd", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("semipd")


_ENGINES: Final = ("tests/e2e/", "tests/semipd_server/", "tests/semipd_jax/launch/")
"""Folders with most of the tests that start engines or servers."""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As a program is that a shell has not started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines first."""
    items.sort(key=lambda item: not item.nodeid.startswith(_ENGINES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all engines, one after another; each other file is run by one as well."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class EnginesApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "engines" if nodeid.startswith(_ENGINES) else nodeid.partition("::")[0]

    return EnginesApart(config, log)


@pytest.fixture
def restored_logs() -> Iterator[None]:
    """For tests of commands, which send the process's log elsewhere."""
    loggers = [logging.getLogger(name) for name in (None, "semipd_jax", "semipd_server")]
    states = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in states:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)
