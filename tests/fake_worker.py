"""`python -m fake_worker`: a worker process whose device is `fake_device`.

A file in the run directory changes what workers of a lane do: with `die-LANE` they die at start,
with `sleep-LANE` they never become ready, with `hang-LANE` one holds the next step for good, with
`fail-LANE` one fails in the next step, with `stay-LANE` they do not leave when they are asked to.
"""

import os
import time
from pathlib import Path

from fake_device import FakeDevice

from semipd_jax.child import Child, run_child
from semipd_jax.messages import FromWorker, ToWorker, WorkerReady
from semipd_jax.transport.channels import WORKERS, Link


def main(child: Child) -> None:
    spec, layout = child.spec, child.spec.layout
    assert layout is not None
    assert spec.lane is not None
    directory = Path(spec.run_dir)
    if (directory / f"die-{spec.lane}").exists():
        os._exit(9)
    if (directory / f"sleep-{spec.lane}").exists():
        child.wait(3600)
        return
    device = FakeDevice(
        num_pages=layout.num_pages,
        page_size=layout.page_size,
        num_rows=layout.num_rows,
        length=layout.max_model_len + 1,
        directory=directory,
    )
    worker_id = spec.extra["worker_id"]
    link = Link[ToWorker, FromWorker](spec.run_dir, WORKERS, worker_id, ToWorker)
    link.send(WorkerReady(worker_id, spec.lane, spec.share or 1.0))
    child.ready()
    while not child.stopping.is_set():
        step = link.receive(0.1)
        if step is not None and _took(directory / f"hang-{spec.lane}"):
            time.sleep(3600)
        if _took(directory / f"fail-{spec.lane}"):
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        if step is not None:
            link.send(device.run(step, worker_id))
    link.close()
    while (directory / f"stay-{spec.lane}").exists():
        time.sleep(0.05)


def _took(path: Path) -> bool:
    """Removes a file; of many that try, one did."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    run_child(main, grace_s=60.0)  # one that stays may stay
