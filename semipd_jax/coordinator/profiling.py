"""`python -m semipd_jax.coordinator.profiling`: in the coordinator's place to make a profile.

Runs every trial on the engine's own workers and leaves the samples in `SAMPLES_FILE` of the run
directory. A sample is the median of a trial's steps; of steps side by side, those count during
which the other phase ran (nearly) all the time.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final, Protocol, runtime_checkable

import msgspec

from semipd_jax.child import Child, run_child
from semipd_jax.config import PHASES, EngineConfig, Lane
from semipd_jax.coordinator.coordinator import DEPTH
from semipd_jax.coordinator.overlap import Overlaps
from semipd_jax.coordinator.trials import Trial, step_of, trials
from semipd_jax.errors import EngineError, StartupError
from semipd_jax.messages import (
    FromWorker,
    MemoryLayout,
    Phase,
    StepDone,
    ToWorker,
    WorkerLost,
    WorkerReady,
)
from semipd_jax.transport.channels import WORKERS, Hub, Poller
from semipd_jax.tuner.latency import Conditions, Sample
from semipd_jax.tuner.setup import ladders_of
from semipd_jax.tuner.work import Work, work_of

SAMPLES_FILE: Final = "samples.json"
STAGE: Final = "measure"

_WARM_UP: Final = 2  # steps of each phase before those that count
_MOST_STEPS: Final = 8
_FEWEST_STEPS: Final = 2
_TRIAL_S: Final = 2.0  # then the fewest steps will do
_SIDE_BY_SIDE: Final = 0.95
_TICK_S: Final = 0.5

type _Lane = deque[tuple[int, Work]]
"""Steps in flight of a phase, oldest first."""


@runtime_checkable
class Workers(Protocol):
    """The half of a hub that trials need."""

    def send(self, peer: str, message: ToWorker) -> bool: ...


class Bench:
    """Runs one trial at a time.

    Args:
      receive: waits a little; what workers have said meanwhile.
      clock: seconds.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        workers: Workers,
        receive: Callable[[], list[FromWorker]],
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout = layout
        self._workers = workers
        self._receive = receive
        self._timeout_s = timeout_s
        self._clock = clock
        self._ids: dict[tuple[Lane, float], str] = {}
        self._next_id = 1

    def await_workers(self, wanted: set[tuple[Phase, float]]) -> None:
        self._until(lambda: wanted <= self._ids.keys(), "workers", self._note)

    def run(self, trial: Trial) -> list[Sample]:
        """Samples, at most one for each phase."""
        run = _Run(trial, self._clock)
        self._fill(run)
        self._until(lambda: run.is_enough, str(trial), lambda m: self._take(run, m, refill=True))
        idle = lambda: not any(run.lanes.values())  # noqa: E731
        self._until(idle, str(trial), lambda m: self._take(run, m, refill=False))
        return run.samples()

    def _fill(self, run: "_Run") -> None:
        for phase, shape in run.trial.shapes.items():
            while len(run.lanes[phase]) < DEPTH:
                step = step_of(shape, self._next_id, self._layout)
                self._next_id += 1
                worker = self._ids[phase, run.trial.shares[phase]]
                if not self._workers.send(worker, step):
                    raise EngineError(f"{worker} cannot be reached")
                run.sent(phase, step.step_id, work_of(step))

    def _take(self, run: "_Run", message: FromWorker, *, refill: bool) -> None:
        if isinstance(message, StepDone):
            run.done(message)
            if refill:
                self._fill(run)

    def _note(self, message: FromWorker) -> None:
        if isinstance(message, WorkerReady):
            self._ids[message.lane, message.share] = message.worker_id

    def _until(
        self, is_over: Callable[[], bool], what: str, take: Callable[[FromWorker], None]
    ) -> None:
        deadline = self._clock() + self._timeout_s
        while not is_over():
            if self._clock() > deadline:
                raise EngineError(f"{what}: nothing came in {self._timeout_s:.0f} s")
            for message in self._receive():
                take(message)
                deadline = self._clock() + self._timeout_s


class _Run:
    """A trial that runs."""

    def __init__(self, trial: Trial, clock: Callable[[], float]) -> None:
        self.trial = trial
        self.lanes: dict[Phase, _Lane] = {phase: deque() for phase in trial.shapes}
        self._clock = clock
        self._started_s = clock()
        self._overlaps = Overlaps()
        self._num_done: dict[Phase, int] = dict.fromkeys(trial.shapes, 0)
        self._seconds: defaultdict[Phase, list[float]] = defaultdict(list)
        self._work: dict[Phase, Work] = {}

    @property
    def is_enough(self) -> bool:
        is_late = self._clock() - self._started_s > _TRIAL_S
        wanted = _FEWEST_STEPS if is_late else _MOST_STEPS
        return all(len(self._seconds[phase]) >= wanted for phase in self.lanes)

    def sent(self, phase: Phase, step_id: int, work: Work) -> None:
        self.lanes[phase].append((step_id, work))
        if len(self.lanes[phase]) == 1:
            self._overlaps.began(phase, self.trial.shares[phase], self._clock())

    def done(self, reply: StepDone) -> None:
        phase = self._phase_of(reply)
        lane, now_s = self.lanes[phase], self._clock()
        _, self._work[phase] = lane.popleft()
        conditions = self._overlaps.ended(phase, now_s)
        if lane:
            self._overlaps.began(phase, self.trial.shares[phase], now_s)
        self._num_done[phase] += 1
        is_beside = len(self.lanes) == 1 or conditions.overlap >= _SIDE_BY_SIDE
        if self._num_done[phase] > _WARM_UP and is_beside:
            self._seconds[phase].append(reply.device_s)

    def _phase_of(self, reply: StepDone) -> Phase:
        for phase, lane in self.lanes.items():
            if lane and lane[0][0] == reply.step_id:
                return phase
        raise EngineError(f"{reply.worker_id} answered step {reply.step_id} out of turn")

    def samples(self) -> list[Sample]:
        shares = self.trial.shares
        made: list[Sample] = []
        for phase, seconds in self._seconds.items():
            others = [share for p, share in shares.items() if p != phase]
            overlap = 1.0 if others else 0.0
            conditions = Conditions(shares[phase], others[0] if others else 0.0, overlap)
            made.append(Sample(self._work[phase], conditions, median(seconds)))
        return made


def main(child: Child) -> None:
    spec = child.spec
    if spec.layout is None:
        raise StartupError("profiling was started without a memory layout")
    config, ladders = spec.config, ladders_of(spec.config.shares)
    hub = Hub[FromWorker, ToWorker](spec.run_dir, WORKERS, FromWorker)
    poller = Poller()
    poller.add(hub)
    poller.add(child.fileno())

    def receive() -> list[FromWorker]:
        child.alive()
        poller.wait(_TICK_S)
        child.alive()
        for command in child.receive():
            if isinstance(command, WorkerLost):
                raise EngineError(f"{command.worker_id} was lost")
        if child.stopping.is_set():
            raise SystemExit(0)
        return [message for _, message in hub.receive()]

    child.ready()
    bench = Bench(spec.layout, hub, receive, timeout_s=_timeout_s(config))
    bench.await_workers({(p, s) for p in PHASES for s in ladders.of(p)})
    plan = list(trials(spec.layout, config.scheduler.max_num_batched_tokens, ladders))
    samples: list[Sample] = []
    for i, trial in enumerate(plan):
        child.progress(STAGE, i, len(plan), str(trial))
        samples += bench.run(trial)
    (Path(spec.run_dir) / SAMPLES_FILE).write_bytes(msgspec.json.encode(samples))
    child.progress(STAGE, len(plan), len(plan))
    while not child.stopping.is_set():
        child.alive()
        child.wait(_TICK_S)
        child.alive()
        child.receive()
    hub.close()


def _timeout_s(config: EngineConfig) -> float:
    return max(config.timeouts.startup_s, config.timeouts.step_s)


if __name__ == "__main__":
    run_child(main)
