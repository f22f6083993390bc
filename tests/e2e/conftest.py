"""Real engines: real processes, real shared memory, real checkpoints.

A start compiles nothing if an engine with the same limits ran before: only tests that are about
limits have limits of their own.
"""

from collections.abc import Iterator

import pytest

from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import Engine


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory) -> str:
    """One directory for the whole run, so that each program is compiled once."""
    return str(tmp_path_factory.mktemp("compile-cache"))


@pytest.fixture(scope="module")
def demo_engine(compile_cache) -> Iterator[Engine]:
    """The demo model, shared by the tests of a file that leave it as they found it."""
    with Engine(
        str(MODEL_DIR),
        max_num_seqs=8,
        max_num_batched_tokens=64,
        compile_cache_dir=compile_cache,
    ) as engine:
        yield engine
