"""Receive → update → plan → send: one loop over one scheduler.

Each lane has up to `DEPTH` steps in flight: the next one waits at the worker while the last one
runs, so the hop to this process costs nothing in the steady state. A step that was sent is sent
again, unchanged, when its worker is lost: it writes the same tokens to the same places.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

from semipd_jax.config import Lane, Phase, SharePolicy
from semipd_jax.coordinator.outbox import outputs
from semipd_jax.coordinator.report import Counts, partition_of, stats_of
from semipd_jax.coordinator.shares import ShareControl
from semipd_jax.coordinator.structured import Compiled, Masked, MaskMaker
from semipd_jax.coordinator.workers import LaneWorkers
from semipd_jax.errors import ConfigError
from semipd_jax.messages import (
    Abort,
    Admitted,
    Done,
    FromCoordinator,
    FromWorker,
    GetStats,
    Outputs,
    PartitionReply,
    Refused,
    RetireWorker,
    SetPartition,
    SetSlo,
    Stalled,
    StartWorker,
    StepDone,
    Submit,
    ToCoordinator,
    ToLauncher,
    ToWorker,
    WorkerReady,
)
from semipd_jax.request import Request, Timings
from semipd_jax.scheduler.lanes import next_step
from semipd_jax.scheduler.scheduler import Ending, Result, Scheduler, Sent
from semipd_jax.scheduler.state import Constraint
from semipd_jax.tuner.slo import SloTarget, SloTargets

DEPTH: Final = 2
_MASK_WAIT_S: Final = 0.001
"""The loop waits so long for masks, so that their rows take part in the very next step."""

_log = logging.getLogger(__name__)


@runtime_checkable
class Sender[Message](Protocol):
    """The half of `transport.channels.Hub` that the coordinator needs."""

    def send(self, peer: str, message: Message) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request whose grammar is being compiled."""

    arrival_s: float
    priority: int


class Coordinator:
    """Takes messages, returns nothing, sends what follows from them.

    Args:
      shares: at which share each lane should run, and which lanes there are.
      tell_launcher: told of a worker that holds a step for longer than `step_timeout_s`, and which
        workers beside those of the ladder are wanted.
      grammars: None if the model's tokenizer does not allow structured outputs.
      clock: seconds; one clock for everything in this process.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        workers: Sender[ToWorker],
        clients: Sender[FromCoordinator],
        shares: ShareControl[Any],
        *,
        step_timeout_s: float,
        tell_launcher: Callable[[ToLauncher], None],
        grammars: MaskMaker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._workers = workers
        self._clients = clients
        self._shares = shares
        self._step_timeout_s = step_timeout_s
        self._tell_launcher = tell_launcher
        self._grammars = grammars
        self._compiling: dict[tuple[str, int], _Waiting] = {}
        self._clock = clock
        self._lost: set[str] = set()  # workers that were lost before they were known to be ready
        self._lanes: dict[Lane, LaneWorkers] = {lane: LaneWorkers(lane) for lane in shares.asked}
        self._counts = Counts()

    # ------------------------------------------------------------ receive

    def from_worker(self, message: FromWorker) -> None:
        match message:
            case WorkerReady():
                self._worker_ready(message)
            case StepDone():
                self._step_done(message)

    def from_client(self, client: str, message: ToCoordinator) -> None:
        now = self._clock()
        match message:
            case Submit(handle=handle, request=request):
                if request.sampling.structured_outputs is None:
                    self._submit(client, handle, request, now)
                else:
                    self._compile(client, handle, request)
            case Abort(handle=handle, reason=reason, error=error):
                if (waiting := self._compiling.pop((client, handle), None)) is not None:
                    self._leave_compiling(client, message, waiting, now)
                result = self._scheduler.abort(client, handle, reason, now_s=now, error=error)
                self._deliver(result)
                self._send_steps()  # a row and pages may have come free
            case GetStats(query_id=query_id):
                partition = partition_of(self._shares, self._lanes, now)
                args = (query_id, self._counts, partition, self._scheduler, self._shares, now)
                stats = stats_of(*args, num_compiling=len(self._compiling))
                self._to_client(client, stats)
            case SetPartition() | SetSlo():
                self._change(client, message)

    def masks_made(self) -> None:
        """Takes what grammars made meanwhile. Call it whenever there may be."""
        assert self._grammars is not None
        if made := self._grammars.take():
            result = Result()
            self._apply(made, result)
            self._send_steps()
            self._deliver(result)

    def worker_lost(self, lane: Lane, worker_id: str, *, is_to_blame: bool = True) -> None:
        """The process is gone for good, and a replacement is being started. If it is to blame, a
        crash is counted against what it ran."""
        self._counts.num_restarts[lane] += 1
        if worker_id in self._lanes[lane].shares:
            self._remove(self._lanes[lane], worker_id, is_to_blame=is_to_blame)
        else:
            self._lost.add(worker_id)

    def share_unavailable(self, lane: Lane, share: float) -> None:
        """No worker could be started at this share: the lane stays at the one it has."""
        if self._shares.asked[lane] == share:
            self._shares.asked[lane] = self._lanes[lane].share or max(self._shares.rungs[lane])
            _log.warning("%s stays at share %.2f", lane, self._shares.asked[lane])

    def watch(self) -> None:
        """Reports workers that hold a step for too long. Call it every now and then."""
        now = self._clock()
        for workers in self._lanes.values():
            since = workers.running_since_s
            if workers.holder and since is not None and now - since > self._step_timeout_s:
                workers.running_since_s = now  # once per timeout
                self._tell_launcher(Stalled(worker_id=workers.holder))

    # ------------------------------------------------------------ update

    def _worker_ready(self, message: WorkerReady) -> None:
        if message.worker_id in self._lost:
            return  # the launcher was quicker to tell
        workers = self._lanes[message.lane]
        if (replaced := workers.at(message.share)) is not None:
            self._remove(workers, replaced, is_to_blame=True)
        workers.shares[message.worker_id] = message.share
        _log.info("%s is ready", message.worker_id)
        self._send_steps()
        self._retire_spare(workers)

    def _step_done(self, reply: StepDone) -> None:
        started = time.perf_counter()
        now = self._clock()
        workers = next((w for w in self._lanes.values() if w.holder == reply.worker_id), None)
        if workers is None or not workers.answered(reply.worker_id, reply.step_id, now):
            return  # from a worker that was given up meanwhile
        self._counts.num_compiles[reply.worker_id] = reply.num_compiles
        self._shares.step_done(workers.lane, reply.device_s)
        result = self._scheduler.step_done(reply, now_s=now)
        if result.unmasked and self._grammars is not None:
            for token in result.unmasked:
                self._grammars.advance(token.request, token.token_id)
            self._apply(self._grammars.take(_MASK_WAIT_S), result)
        self._send_steps()
        self._deliver(result)
        self._retire_spare(workers)
        self._counts.plan_times.add(time.perf_counter() - started)

    def _remove(self, workers: LaneWorkers, worker_id: str, *, is_to_blame: bool) -> None:
        """Takes back the steps of a worker that was lost."""
        step_ids = workers.remove(worker_id)
        _log.warning("%s was lost with %d steps in flight", worker_id, len(step_ids))
        if step_ids:
            self._shares.steps_lost(workers.lane)
            now = self._clock()
            self._deliver(self._scheduler.worker_lost(step_ids, now_s=now, is_to_blame=is_to_blame))
        self._send_steps()

    # ------------------------------------------------------------ requests

    def _submit(
        self,
        client: str,
        handle: int,
        request: Request,
        arrival_s: float,
        constraint: Constraint | None = None,
    ) -> None:
        refusal = self._scheduler.submit(
            client, handle, request, now_s=arrival_s, constraint=constraint
        )
        if refusal is None:
            self._send_steps()
        else:
            self._turn_away(client, handle, refusal)

    def _compile(self, client: str, handle: int, request: Request) -> None:
        """The request is queued when its grammar is compiled."""
        if self._grammars is None:
            field = "structured_outputs"
            text = f"{field} cannot be had with this model's tokenizer; allowed: unset"
            self._to_client(client, Refused(handle, text, field))
        elif len(self._compiling) >= (most := self._scheduler.state.limits.max_num_queued_reqs):
            text = f"{most} grammars are being compiled already, the most allowed; try again"
            self._turn_away(client, handle, text)
        else:
            self._compiling[client, handle] = _Waiting(self._clock(), request.priority)
            is_wanted = partial(self._compiling.__contains__, (client, handle))
            self._grammars.compile(client, handle, request, is_wanted)

    def _leave_compiling(self, client: str, abort: Abort, waiting: _Waiting, now_s: float) -> None:
        if abort.error is None:
            self._judge_compiling(waiting, now_s)
        else:
            self._counts.attainment.missed(now_s)
        timings = Timings(queue_s=now_s - waiting.arrival_s)
        done = Done(abort.handle, abort.reason, timings, 0)
        self._to_client(client, Outputs(b"", b"", [], [done]))

    def _judge_compiling(self, waiting: _Waiting, now_s: float) -> None:
        """Its client left."""
        target = self._shares.targets.of(waiting.priority)
        self._counts.attainment.left(now_s - waiting.arrival_s, target, now_s)

    def _turn_away(self, client: str, handle: int, reason: str) -> None:
        """There is no room, which is no fault of the client's: it misses what was promised."""
        self._counts.attainment.missed(self._clock())
        self._to_client(client, Refused(handle, reason))

    def _compiled(self, made: Compiled) -> None:
        client, handle = made.client, made.handle
        waiting = self._compiling.pop((client, handle), None)
        if waiting is None:
            return  # nobody wants it any more
        if made.constraint is None:
            self._to_client(client, Refused(handle, made.error, made.field))
        else:
            self._submit(client, handle, made.request, waiting.arrival_s, made.constraint)

    def _apply(self, made: list[Compiled | Masked], result: Result) -> None:
        """Adds the endings that follow from masks to `result`. Masks first: a request that is
        queued sends steps."""
        now = self._clock()
        for one in sorted(made, key=lambda one: isinstance(one, Compiled)):
            match one:
                case Compiled():
                    self._compiled(one)
                case Masked(request=request, mask=mask, error=error):
                    ended = self._scheduler.mask_made(request, mask, now_s=now, error=error)
                    result.endings += ended.endings

    # ------------------------------------------------------------ shares

    def _ask_for(self, phase: Phase, share: float) -> None:
        workers = self._lanes[phase]
        self._shares.asked[phase] = share
        if workers.at(share) is None and share not in self._shares.rungs[phase]:
            self._tell_launcher(StartWorker(lane=phase, share=share))
        self._send_steps()
        self._retire_spare(workers)

    def _retire_spare(self, workers: LaneWorkers) -> None:
        """Lets go of workers beside the ladder that are no longer asked for."""
        kept = self._shares.rungs[workers.lane] | {self._shares.asked[workers.lane]}
        for worker_id in workers.spare(kept):
            workers.remove(worker_id)
            self._tell_launcher(RetireWorker(worker_id=worker_id))

    def _set_partition(self, message: SetPartition) -> None:
        given = (message.prefill, message.decode) != (None, None)
        policy: SharePolicy | None = "static" if given else message.policy
        if given and not {"prefill", "decode"} <= self._lanes.keys():
            raise ConfigError("a mode with one worker for both phases has no shares")
        if policy is not None:
            self._shares.set_policy(policy, self._shares.targets)
        if message.prefill is not None:
            self._ask_for("prefill", message.prefill)
        if message.decode is not None:
            self._ask_for("decode", message.decode)

    def _change(self, client: str, change: SetPartition | SetSlo) -> None:
        error = None
        try:
            if isinstance(change, SetPartition):
                self._set_partition(change)
            else:
                targets = _with_slo(self._shares.targets, change)
                self._shares.set_policy(self._shares.policy, targets)
        except ConfigError as refusal:
            error = str(refusal)
        partition = partition_of(self._shares, self._lanes, self._clock())
        self._to_client(client, PartitionReply(change.query_id, partition, error))

    # ------------------------------------------------------------ plan and send

    def _send_steps(self) -> None:
        """Fills the queues of all lanes."""
        for lane, workers in self._lanes.items():
            if len(workers.step_ids) < DEPTH:
                is_alone = not any(w.step_ids for w in self._lanes.values() if w is not workers)
                workers.wanted = self._shares.wanted(lane, is_alone=is_alone)
            while (worker_id := workers.next_worker(DEPTH)) is not None:
                planned = next_step(self._scheduler, lane, now_s=self._clock())
                if planned is None:
                    break
                workers.sent(worker_id, planned.step.step_id, self._clock())
                self._shares.step_sent(lane, planned.step, workers.shares[worker_id])
                if not self._workers.send(worker_id, planned.step):
                    # It is about to be reported lost, and the step is taken back then.
                    _log.warning("%s cannot be reached", worker_id)
                self._announce(planned)

    def _announce(self, planned: Sent[Any]) -> None:
        for request in planned.admitted:
            if request.num_preemptions == 0:
                assert request.admitted_s is not None
                queue_s = request.admitted_s - request.arrival_s
                self._to_client(
                    request.client, Admitted(request.handle, request.num_cached, queue_s)
                )

    def _deliver(self, result: Result) -> None:
        self._counts.num_output_tokens += len(result.tokens)
        self._judge(result.endings)
        for client, message in outputs(result):
            self._to_client(client, message)

    def _judge(self, endings: list[Ending]) -> None:
        for ending in endings:
            now = self._clock()
            times = self._counts.attainment.add(ending, self._shares.targets, now)
            if times is not None:
                self._shares.request_ended(times)

    def _to_client(self, client: str, message: FromCoordinator) -> None:
        if not self._clients.send(client, message):
            _log.warning("client %s is gone: its requests end", client)
            now = self._clock()
            self._judge(self._scheduler.abort_client(client, now_s=now).endings)
            for key in [key for key in self._compiling if key[0] == client]:
                self._judge_compiling(self._compiling.pop(key), now)
            self._send_steps()


def _with_slo(targets: SloTargets, change: SetSlo) -> SloTargets:
    slo, attainment = SloTarget(change.slo.ttft_ms, change.slo.tpot_ms), change.target
    by_class, default = dict(targets.by_class), targets.default
    if change.slo.priority is None:
        default = slo
    elif change.remove:
        by_class.pop(change.slo.priority, None)
    else:
        by_class[change.slo.priority] = slo
    return SloTargets(default, by_class, targets.attainment if attainment is None else attainment)
