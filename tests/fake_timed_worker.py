"""`python -m fake_timed_worker`: a worker that computes nothing, but takes its time for it."""

import time

from semipd_jax.child import Child, run_child
from semipd_jax.messages import FromWorker, PrefillStep, StepDone, ToWorker, WorkerReady
from semipd_jax.transport.channels import WORKERS, Link

STEP_S = 1e-3
TOKEN_S = 1e-4


def main(child: Child) -> None:
    spec = child.spec
    assert spec.lane is not None
    assert spec.share is not None
    worker_id = spec.extra["worker_id"]
    link = Link[ToWorker, FromWorker](spec.run_dir, WORKERS, worker_id, ToWorker)
    link.send(WorkerReady(worker_id, spec.lane, spec.share))
    child.ready()
    while not child.stopping.is_set():
        step = link.receive(0.1)
        if step is not None:
            prompt = len(step.token_ids) // 4 if isinstance(step, PrefillStep) else 0
            device_s = (STEP_S + TOKEN_S * prompt) / spec.share
            time.sleep(device_s)
            link.send(StepDone(worker_id, step.step_id, step.rows, device_s, num_compiles=0))
    link.close()


if __name__ == "__main__":
    run_child(main)
