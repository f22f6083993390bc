"""`python -m benchmarks.gpu.steps_worker`: in place of an engine's worker, times the largest step
of its phase on its share and leaves the result in the run directory.

Only one of them uses the device at a time.
"""

import contextlib
import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.gpu.peers import take_share
from semipd_jax.child import Child, run_child
from semipd_jax.config import EngineConfig
from semipd_jax.messages import MemoryLayout, StepDone
from semipd_jax.request import Request, SamplingParams
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Limits
from semipd_jax.tuner.work import Work, work_of

_MAP_TIMEOUT_S: Final = 60.0
_NUM_WARM: Final = 4
_NUM_TIMED: Final = 40


def result_path(run_dir: str, phase: str, share: float) -> Path:
    return Path(run_dir) / f"steps-{phase}-{share:.3f}.json"


def main(child: Child) -> None:
    spec = child.spec
    assert spec.layout is not None
    assert spec.lane is not None
    assert spec.share is not None
    grant = take_share(spec.platform, spec.share, spec.lane, spec.extra)
    with _alone(spec.run_dir):
        from semipd_jax.worker import setup

        setup.start_jax(spec.platform, spec.config)
        runner, compiles = setup.build_runner(
            child, spec.layout, spec.lane, map_timeout_s=_MAP_TIMEOUT_S, largest_only=True
        )
        scheduler = Scheduler(_limits(spec.config, spec.layout))
        time_steps = _decode if spec.lane == "decode" else _prefill
        step_s, work = time_steps(scheduler, spec.config, runner)
        found = {
            "phase": spec.lane,
            "share": spec.share,
            "grant": grant.verify(),
            "step_s": step_s,
            "work": asdict(work),
            "num_compiles": compiles.count,
            "kv_bytes_per_token": spec.layout.kv_bytes
            // (spec.layout.num_pages * spec.layout.page_size),
        }
    result_path(spec.run_dir, spec.lane, spec.share).write_text(json.dumps(found))
    child.ready()
    while not child.stopping.is_set():
        child.wait(1.0)


@contextlib.contextmanager
def _alone(run_dir: str) -> Iterator[None]:
    fd = os.open(Path(run_dir) / "device.lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)  # the launcher's start-up timeout bounds the wait
    try:
        yield
    finally:
        os.close(fd)


def _limits(config: EngineConfig, layout: MemoryLayout) -> Limits:
    return Limits(
        page_size=layout.page_size,
        num_pages=layout.num_pages,
        num_rows=layout.num_rows,
        max_model_len=layout.max_model_len,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_num_queued_reqs=config.scheduler.max_num_queued_reqs,
        enable_prefix_caching=False,
    )


def _submit(scheduler: Scheduler, handle: int, num_tokens: int, max_tokens: int) -> None:
    prompt = tuple(np.random.default_rng(handle).integers(5, 400, num_tokens).tolist())
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    request = Request(request_id=str(handle), prompt_token_ids=prompt, sampling=sampling)
    if (reason := scheduler.submit("steps", handle, request, now_s=0.0)) is not None:
        raise ValueError(reason)


def _decode(scheduler: Scheduler, config: EngineConfig, runner: Any) -> tuple[float, Work]:
    """Every row at half of the longest length. Their prompts are not computed: any KV will do."""
    num_rows = config.scheduler.max_num_seqs
    context = scheduler.state.limits.max_model_len // 2
    for handle in range(num_rows):
        _submit(scheduler, handle, context, _NUM_WARM + _NUM_TIMED + 8)
    while (sent := scheduler.next_prefill(now_s=0.0)) is not None:
        _reply(scheduler, sent.step.step_id, bytes(len(sent.step.rows)))
    return _time(scheduler, runner, lambda _: scheduler.next_decode())


def _prefill(scheduler: Scheduler, config: EngineConfig, runner: Any) -> tuple[float, Work]:
    """One prompt that fills the step, each time."""

    def plan(number: int) -> Any:
        _submit(scheduler, number, config.scheduler.max_num_batched_tokens, 1)
        return scheduler.next_prefill(now_s=0.0)

    return _time(scheduler, runner, plan)


def _time(scheduler: Scheduler, runner: Any, plan: Callable[[int], Any]) -> tuple[float, Work]:
    """Mean seconds of a step while the next one is always queued, and what a step computes."""
    pending: deque[Any] = deque()
    work, started_s = None, 0.0
    for number in range(_NUM_WARM + _NUM_TIMED):
        step = plan(number).step
        work = work or work_of(step)
        pending.append(runner.dispatch(step))
        if len(pending) == 2:
            _finish(scheduler, pending.popleft())
        if number == _NUM_WARM:
            started_s = time.perf_counter()
    elapsed_s = time.perf_counter() - started_s
    _finish(scheduler, pending.popleft())
    assert work is not None
    return elapsed_s / (_NUM_TIMED - 1), work


def _finish(scheduler: Scheduler, step: Any) -> None:
    token_ids, _ = step.wait()
    _reply(scheduler, step.step_id, token_ids)


def _reply(scheduler: Scheduler, step_id: int, token_ids: bytes) -> None:
    done = StepDone(
        worker_id="", step_id=step_id, token_ids=token_ids, device_s=0.0, num_compiles=0
    )
    scheduler.step_done(done, now_s=0.0)


if __name__ == "__main__":
    run_child(main)
