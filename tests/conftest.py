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
"""Folders with most of the tests that start engines or servers: these run one after another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines first, by one process; each other file is run by one as well."""
    folders = [Path(__file__).parent / name for name in _ENGINES]

    def has_engines(item: pytest.Item) -> bool:
        return any(item.path.is_relative_to(folder) for folder in folders)

    items.sort(key=lambda item: not has_engines(item))
    for item in items:
        group = "engines" if has_engines(item) else str(item.path)
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
