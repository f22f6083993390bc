"""Engines on modelled devices. All plan with the engine's own scheduler, two steps ahead.

`semi-pd` is driven by the engine's own coordinator. The others are what it is compared with:

* `colocated`: one worker, prefill before decode (vLLM's scheduling before chunked prefill).
* `chunked`: one worker, every step takes all decode rows and fills up with prompt tokens
  (Sarathi-Serve, arXiv 2403.02310; vLLM's default today).
* `disaggregated`: one device for each phase, each with all weights and a pool of its own; decode
  fetches a request's KV over the link when it has room for it, before it decodes (DistServe,
  arXiv 2401.09670, one instance each).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, runtime_checkable

from semipd_jax.config import PHASES, Lane, Phase, ShareConfig, SharePolicy
from semipd_jax.coordinator.coordinator import DEPTH, Coordinator
from semipd_jax.coordinator.tuned import TunedShares, TunerOf
from semipd_jax.messages import (
    FromCoordinator,
    Outputs,
    Refused,
    StepDone,
    Submit,
    ToWorker,
    WorkerReady,
    parts,
)
from semipd_jax.request import Request, Timings
from semipd_jax.scheduler.lanes import next_step
from semipd_jax.scheduler.scheduler import Ending, Scheduler
from semipd_jax.scheduler.state import Limits
from semipd_jax.simulator.device import Device
from semipd_jax.simulator.link import Link
from semipd_jax.simulator.machine import Load, Machine
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.work import work_of

_CLIENT: Final = "client"


@dataclass(frozen=True, slots=True)
class Finished:
    """A request's end; `timings` is None if it was refused."""

    handle: int
    timings: Timings | None = None


type Report = Callable[[Finished], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What every engine is built on.

    Attributes:
      hop_s, host_s, noise: see `Device`.
      report: told of every request that ends.
    """

    machine: Machine
    limits: Limits
    hop_s: float
    host_s: float
    noise: float
    seed: int
    report: Report

    def device(self, num_lanes: int, machine: Machine | None = None) -> Device:
        return Device(
            machine or self.machine,
            num_lanes=num_lanes,
            hop_s=self.hop_s,
            host_s=self.host_s,
            noise=self.noise,
            seed=self.seed,
        )


@runtime_checkable
class Engine(Protocol):
    @property
    def next_s(self) -> float:
        """When something happens next by itself."""
        ...

    def advance(self, now_s: float) -> None:
        """Lets time pass until `now_s`, at most `next_s`."""
        ...

    def submit(self, handle: int, request: Request) -> None: ...

    @property
    def shares(self) -> Mapping[Phase, Sequence[tuple[float, float]]]:
        """(when, share) of each phase's steps that went to another share than the ones before."""
        ...

    def counters(self) -> dict[str, float]:
        """What is worth knowing about the run, by name."""
        ...


class SemiPd:
    """
    Args:
      policy: chooses the shares; "static" keeps those of `shares`.
      tuner_of: makes the tuner of the policy, see `coordinator.tuned`.
    """

    def __init__(
        self,
        environment: Environment,
        shares: ShareConfig,
        policy: SharePolicy,
        targets: SloTargets,
        tuner_of: TunerOf,
    ) -> None:
        self._now_s = 0.0
        self._machine = environment.machine
        self._report = environment.report
        self._device = environment.device(len(PHASES))
        self._scheduler = Scheduler(environment.limits)
        self._control = TunedShares(
            shares, tuner_of, self._scheduler, self._clock, policy=policy, targets=targets
        )
        self._workers: dict[str, tuple[Phase, float]] = {
            f"{phase}@{share}": (phase, share) for phase in PHASES for share in shares.rungs(phase)
        }
        self._coordinator = Coordinator(
            self._scheduler,
            _Sender(self._step_sent),
            _Sender(self._told),
            self._control,
            step_timeout_s=float("inf"),
            tell_launcher=lambda _: None,
            clock=self._clock,
        )
        for worker_id, (phase, share) in self._workers.items():
            self._coordinator.from_worker(WorkerReady(worker_id, phase, share))
        self._share_s = dict.fromkeys(PHASES, 0.0)
        self.shares: dict[Phase, list[tuple[float, float]]] = {phase: [] for phase in PHASES}

    @property
    def next_s(self) -> float:
        return self._device.next_s

    def submit(self, handle: int, request: Request) -> None:
        self._coordinator.from_client(_CLIENT, Submit(handle, request))

    def advance(self, now_s: float) -> None:
        self._now_s = now_s
        for lane, job in self._device.advance(now_s):
            seconds = now_s - job.started_s
            self._share_s[PHASES[lane]] += seconds * job.share
            reply = StepDone(job.worker_id, job.step_id, bytes(4 * job.num_rows), seconds, 0)
            self._coordinator.from_worker(reply)

    def counters(self) -> dict[str, float]:
        busy = dict(zip(PHASES, self._device.busy_s, strict=True))
        errors = self._control.errors
        return {
            "num_preemptions": float(self._scheduler.num_preemptions),
            **{f"{p}_busy_s": busy[p] for p in PHASES},
            **{f"{p}_mean_share": self._share_s[p] / (busy[p] or 1) for p in PHASES},
            **{f"{p}_num_switches": float(max(0, len(self.shares[p]) - 1)) for p in PHASES},
            **{f"{p}_prediction_error": errors[p].mean for p in PHASES if errors[p].count},
        }

    def _clock(self) -> float:
        return self._now_s

    def _step_sent(self, worker_id: str, step: ToWorker) -> None:
        phase, share = self._workers[worker_id]
        if not self.shares[phase] or self.shares[phase][-1][1] != share:
            self.shares[phase].append((self._now_s, share))
        self._device.send(PHASES.index(phase), worker_id, *_job(step, self._machine), share)

    def _told(self, _: str, message: FromCoordinator) -> None:
        if isinstance(message, Refused):
            self._report(Finished(message.handle))
        elif isinstance(message, Outputs):
            for done in message.done:
                self._report(Finished(done.handle, done.timings))


class _Worker:
    """One lane that runs what one scheduler plans, two steps ahead.

    Args:
      lane: what it runs.
      ended: told of every request that ends in this scheduler.
    """

    def __init__(
        self,
        device: Device,
        machine: Machine,
        scheduler: Scheduler,
        lane: Lane,
        ended: Callable[[Ending], None],
    ) -> None:
        self.device = device
        self.scheduler = scheduler
        self._machine = machine
        self._lane: Lane = lane
        self._ended = ended
        self._num_in_flight = 0

    def advance(self, now_s: float) -> None:
        for _, job in self.device.advance(now_s):
            self._num_in_flight -= 1
            reply = StepDone("", job.step_id, bytes(4 * job.num_rows), 0.0, 0)
            for ending in self.scheduler.step_done(reply, now_s=now_s).endings:
                self._ended(ending)

    def send_steps(self, now_s: float) -> None:
        while self._num_in_flight < DEPTH and (
            sent := next_step(self.scheduler, self._lane, now_s=now_s)
        ):
            self.device.send(0, "", *_job(sent.step, self._machine), 1.0)
            self._num_in_flight += 1


class Baseline:
    """Engines whose workers have a device of their own."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.now_s = 0.0
        self.workers: dict[str, _Worker] = {}
        self.shares: dict[Phase, list[tuple[float, float]]] = {}

    @property
    def next_s(self) -> float:
        return min(worker.device.next_s for worker in self.workers.values())

    def advance(self, now_s: float) -> None:
        self.now_s = now_s
        for worker in self.workers.values():
            worker.advance(now_s)
        self.send_steps()

    def submit(self, handle: int, request: Request) -> None:
        raise NotImplementedError

    def send_steps(self) -> None:
        """Once all devices are at the same time."""
        for worker in self.workers.values():
            worker.send_steps(self.now_s)

    def counters(self) -> dict[str, float]:
        schedulers = {worker.scheduler for worker in self.workers.values()}
        busy = {f"{name}_busy_s": w.device.busy_s[0] for name, w in self.workers.items()}
        return {"num_preemptions": float(sum(s.num_preemptions for s in schedulers)), **busy}

    def queue(self, scheduler: Scheduler, handle: int, request: Request) -> None:
        if scheduler.submit(_CLIENT, handle, request, now_s=self.now_s) is not None:
            self.environment.report(Finished(handle))


class OneWorker(Baseline):
    """The engine in a mode with one worker for both phases."""

    def __init__(self, environment: Environment, lane: Lane) -> None:
        super().__init__(environment)
        self._scheduler = Scheduler(environment.limits)
        self.workers["worker"] = _Worker(
            environment.device(1),
            environment.machine,
            self._scheduler,
            lane,
            lambda e: environment.report(Finished(e.request.handle, e.timings)),
        )

    def submit(self, handle: int, request: Request) -> None:
        self.queue(self._scheduler, handle, request)
        self.send_steps()


class Disaggregated(Baseline):
    """Two devices and a link between them.

    The decode device's scheduler admits a request when it has room; its "prefill" is the transfer
    of the KV, which takes no compute and brings the first token. The prefill device frees a
    request's pages at once, not when the KV was fetched: its pool is nearly empty (semi-PD, section
    3: 1.7 % of the memory).
    """

    def __init__(self, environment: Environment, link: Link) -> None:
        super().__init__(environment)
        limits = environment.limits
        self._prefill = Scheduler(limits)
        self._decode = Scheduler(replace(limits, max_num_batched_tokens=limits.max_model_len))
        self._requests: dict[int, Request] = {}
        self._prefilled: dict[int, Timings] = {}
        machine = environment.machine

        def add(name: str, machine: Machine, scheduler: Scheduler, lane: Lane, ended: Any) -> None:
            device = environment.device(1, machine)
            self.workers[name] = _Worker(device, machine, scheduler, lane, ended)

        add("prefill", machine, self._prefill, "prefill", self._first_token)
        # As in the coordinator, decode plans first: what it leaves of the pages is for transfers.
        add("decode", machine, self._decode, "decode", self._ended)
        add("link", link, self._decode, "prefill", self._ended)

    def submit(self, handle: int, request: Request) -> None:
        self._requests[handle] = request
        first_token = replace(request, sampling=replace(request.sampling, max_tokens=1))
        self.queue(self._prefill, handle, first_token)
        self.send_steps()

    def _first_token(self, ending: Ending) -> None:
        handle, timings = ending.request.handle, ending.timings
        request = self._requests.pop(handle)
        if request.sampling.max_tokens == 1:
            self.environment.report(Finished(handle, timings))
            return
        self._prefilled[handle] = timings
        self.queue(self._decode, handle, request)

    def _ended(self, ending: Ending) -> None:
        handle, late = ending.request.handle, ending.timings
        early = self._prefilled.pop(handle)
        decode_s = late.queue_s + late.prefill_s + late.decode_s
        timings = Timings(early.queue_s, early.prefill_s, decode_s, late.num_preemptions)
        self.environment.report(Finished(handle, timings))


def _job(step: ToWorker, machine: Machine) -> tuple[int, int, Load]:
    """Id, rows and load of a step."""
    steps = parts(step)
    num_rows = sum(len(part.rows) // 4 for part in steps)
    return step.step_id, num_rows, machine.load(tuple(map(work_of, steps)))


class _Sender:
    """The half of a hub that the coordinator sees."""

    def __init__(self, receive: Callable[[str, Any], None]) -> None:
        self._receive = receive

    def send(self, peer: str, message: Any) -> bool:
        self._receive(peer, message)
        return True
