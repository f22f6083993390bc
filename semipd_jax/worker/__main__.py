"""`python -m semipd_jax.worker`: a child process of the launcher."""

import contextlib
import gc
import logging
import os
from typing import Final

from semipd_jax.child import Child, run_child
from semipd_jax.errors import StartupError
from semipd_jax.messages import FROM_CACHE, FromWorker, ToWorker, WorkerReady
from semipd_jax.shares import backend as shares
from semipd_jax.storage.backend import worker_environment
from semipd_jax.storage.host_memory import private_bytes
from semipd_jax.transport.channels import WORKERS, Link
from semipd_jax.worker.priority import giving_way

_MAP_TIMEOUT_S: Final = 30.0

_log = logging.getLogger(__name__)


def main(child: Child) -> None:
    spec = child.spec
    worker_id = spec.extra.get("worker_id")
    if spec.layout is None or spec.lane is None or spec.share is None or worker_id is None:
        raise StartupError("a worker needs a memory layout, a lane, a share and a worker_id")
    grant = shares.apply(spec.platform, spec.share, spec.lane, spec.extra)
    _set_environment(worker_environment(spec.platform, spec.layout.worker_fraction))
    is_extra = spec.extra.get("is_extra") == "True"
    with giving_way() if is_extra else contextlib.nullcontext():
        from semipd_jax.runtime.cache import CacheUse  # these start jax, which must see all this
        from semipd_jax.worker import loop, setup

        setup.start_jax(spec.platform, spec.config)
        cache = CacheUse()
        runner, compiles = setup.build_runner(
            child, spec.layout, spec.lane, map_timeout_s=_MAP_TIMEOUT_S
        )
    num_programs = cache.num_hits + cache.num_misses
    child.progress(FROM_CACHE, cache.num_hits, num_programs)
    _log.info("runs on %s", grant.verify())
    gc.collect()
    gc.freeze()  # what start-up made lives on: no collection has to look at it again

    link = Link[ToWorker, FromWorker](spec.run_dir, WORKERS, worker_id, ToWorker)
    link.send(WorkerReady(worker_id, spec.lane, spec.share))
    child.ready(private_bytes=private_bytes())
    loop.serve(child, link, runner, compiles, worker_id)
    link.close()


def _set_environment(changes: dict[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


if __name__ == "__main__":
    run_child(main)
