"""The real processes with workers that compute nothing."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import checkpoint
from semipd_jax import options
from semipd_jax.launch.launcher import FrontEnd, Launcher, Modules
from semipd_server.settings import Settings


@contextmanager
def fake_engine(
    num_streams: int,
    settings: Settings | None = None,
    *,
    front_end: str = "semipd_server.main",
    **flags: Any,
) -> Iterator[Launcher]:
    """Owner, coordinator, front end and fake workers around a tiny random model.

    Args:
      num_streams: requests that run at once.
      settings: of the front end; by default gRPC on a free port.
      front_end: its module.
      flags: further options, by name.
    """
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.write_metadata(Path(directory), checkpoint.TINY)
        config = options.build_config(
            directory,
            load_format="dummy",
            kv_cache_memory_bytes=256 << 20,
            max_num_seqs=num_streams,
            max_num_batched_tokens=8192,
            **flags,
        )
        extra = (settings or Settings(port=0)).to_extra()
        launcher = Launcher(
            config,
            front_end=FrontEnd(module=front_end, extra=extra),
            modules=Modules(worker="benchmarks.fake_worker"),
        )
        launcher.start()
        try:
            yield launcher
        finally:
            launcher.stop()
