import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

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


_ENGINES: Final = ("e2e", "semipd_server", "semipd_jax/launch")
"""Folders whose tests start engines or servers: one at a time, as a machine may have two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines first, by one process; each other file is run by one as well."""
    tests = Path(__file__).parent

    def folder_of(item: pytest.Item) -> str | None:
        path = item.path.relative_to(tests)
        return next((name for name in _ENGINES if path.is_relative_to(name)), None)

    items.sort(key=lambda item: folder_of(item) is None)
    for item in items:
        group = "engines" if folder_of(item) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


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
