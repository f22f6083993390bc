"""An engine without processes: the coordinator, its policies and the compiled steps of a real
checkpoint over shared memory. What is compiled serves every mode and policy, one after another.

Only the pipes and sockets between processes are missing: steps are dispatched as they arrive, as
the worker does, and answered when the test says so.
"""

import contextlib
import math
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from semipd_jax.child import Child
from semipd_jax.config import (
    LANES,
    CacheConfig,
    EngineConfig,
    Lane,
    ModelConfig,
    SchedulerConfig,
)
from semipd_jax.coordinator.setup import build_coordinator
from semipd_jax.messages import (
    ChildSpec,
    FromCoordinator,
    GetStats,
    Outputs,
    PartitionReply,
    SetPartition,
    SetSlo,
    Stats,
    StepDone,
    Submit,
    ToLauncher,
    ToWorker,
    WorkerReady,
)
from semipd_jax.models.checkpoint import open_checkpoint
from semipd_jax.models.registry import load_spec
from semipd_jax.owner.plan import plan_memory
from semipd_jax.request import Request
from semipd_jax.runtime.runner import PendingStep, StepRunner
from semipd_jax.storage.backend import backend
from semipd_jax.storage.budget import Budget
from semipd_jax.storage.cpu import HostMemory
from semipd_jax.storage.server import MemoryServer
from semipd_jax.worker.setup import build_runner

STEP_S = 0.01
"""A step takes this long on the engine's clock."""

_MAP_TIMEOUT_S = 60.0
_CLIENT = "c"


class Programs:
    """A checkpoint in shared memory, and the largest program of every kind of step.

    Two runners map the memory each for itself, as processes do: prefill's, and one with all kinds
    of steps, which decodes beside it or serves both phases alone.
    """

    def __init__(self, model: Path, run_dir: Path, *, num_pages: int, **limits: int) -> None:
        spec = load_spec(model)
        storage = backend("cpu")
        sizes = [math.prod(a.page_shape) for a in spec.kv_layout(storage.page_size)]
        pool_bytes = num_pages * spec.num_layers * 4 * sum(sizes)
        self.config = EngineConfig(
            model=ModelConfig(path=str(model), dtype="float32", max_model_len=128),
            cache=CacheConfig(memory_bytes=pool_bytes),
            scheduler=SchedulerConfig(**limits),
        )
        checkpoint = open_checkpoint(model, spec, "auto", seed=0)
        plan = plan_memory(
            spec,
            self.config,
            eos_token_ids=checkpoint.eos_token_ids,
            budget=Budget(available_bytes=1 << 30),
            default_dtype=storage.dtype,
            default_page_size=storage.page_size,
        )
        self.layout = plan.layout
        weights, self._state = HostMemory(plan.weights), HostMemory(plan.state)
        for weight in spec.weights:
            with weights.writing(weight.path) as array:
                checkpoint.read(weight, array)
        with contextlib.closing(MemoryServer(str(run_dir), [weights, self._state])) as server:
            self._prefill = self._map(server, run_dir, "prefill")
            self._all = self._map(server, run_dir, "chunked")
        weights.close()

    def runner_of(self, lane: Lane) -> StepRunner:
        return self._prefill if lane == "prefill" else self._all

    def forget(self) -> None:
        """What was computed before does not help whoever forgets to compute it again."""
        for entry in self._state.region.arrays:
            with self._state.writing(entry.path) as array:
                array[...] = 0

    def _map(self, server: MemoryServer, run_dir: Path, lane: Lane) -> StepRunner:
        answering = threading.Thread(target=server.answer)
        answering.start()
        spec = ChildSpec(name=lane, run_dir=str(run_dir), config=self.config, layout=self.layout)
        with open(os.devnull, "w") as nobody:
            child = Child(spec, nobody.fileno())
            runner, _ = build_runner(
                child, self.layout, lane, map_timeout_s=_MAP_TIMEOUT_S, largest_only=True
            )
        answering.join(_MAP_TIMEOUT_S)
        return runner


class _Channel:
    """A channel's end that hands over what is sent."""

    def __init__(self, send: Callable[[str, Any], bool]) -> None:
        self.send = send


class InProcessEngine:
    """
    Args:
      config: of the engine that `programs` were made for, but for mode, policies and cache.

    Attributes:
      tokens: handle → what came so far.
      kinds: names of the kinds of steps that were sent.
    """

    def __init__(self, programs: Programs, config: EngineConfig) -> None:
        self._programs = programs
        self._lanes = LANES[config.mode]
        self._pending: dict[str, deque[PendingStep]] = {}
        self._lane_of: dict[str, Lane] = {}
        self._answers: list[Stats | PartitionReply] = []
        self._num_workers = self._num_handles = 0
        self.tokens: defaultdict[int, list[int]] = defaultdict(list)
        self.done: set[int] = set()
        self.kinds: set[str] = set()
        self.now_s = 0.0
        self._coordinator = build_coordinator(
            config,
            programs.layout,
            _Channel(self._dispatch),
            _Channel(self._take),
            tell_launcher=self._refuse,
            clock=lambda: self.now_s,
        )
        programs.forget()
        for lane in self._lanes:
            for share in config.shares.rungs(lane):
                self._start_worker(lane, share)

    @property
    def busy(self) -> list[str]:
        """Workers with steps in flight."""
        return [worker_id for worker_id, steps in self._pending.items() if steps]

    def submit(self, request: Request) -> int:
        self._num_handles += 1
        self._coordinator.from_client(_CLIENT, Submit(self._num_handles, request))
        return self._num_handles

    def change(self, change: SetPartition | SetSlo) -> None:
        self._coordinator.from_client(_CLIENT, change)
        reply = self._answers.pop()
        assert isinstance(reply, PartitionReply)
        assert reply.error is None

    def stats(self) -> Stats:
        self._coordinator.from_client(_CLIENT, GetStats(1))
        stats = self._answers.pop()
        assert isinstance(stats, Stats)
        return stats

    def answer(self, worker_id: str) -> None:
        """Waits for the worker's oldest step and tells of it."""
        step = self._pending[worker_id].popleft()
        token_ids, logprobs = step.wait()
        self.now_s += STEP_S
        done = StepDone(worker_id, step.step_id, token_ids, STEP_S, 0, logprobs)
        self._coordinator.from_worker(done)

    def lose(self, worker_id: str) -> None:
        """The worker dies with its steps run but not answered; another one takes its place."""
        for step in self._pending.pop(worker_id):
            step.wait()
        lane = self._lane_of.pop(worker_id)
        self._coordinator.worker_lost(lane, worker_id)
        self._start_worker(lane, float(worker_id.split("-")[1]))

    def _start_worker(self, lane: Lane, share: float) -> None:
        self._num_workers += 1
        worker_id = f"{lane}-{share}-{self._num_workers}"
        self._pending[worker_id], self._lane_of[worker_id] = deque(), lane
        self._coordinator.from_worker(WorkerReady(worker_id, lane, share))

    def _dispatch(self, worker_id: str, step: ToWorker) -> bool:
        if worker_id not in self._pending:
            return False
        self.kinds.add(type(step).__name__)
        runner = self._programs.runner_of(self._lane_of[worker_id])
        self._pending[worker_id].append(runner.dispatch(step))
        return True

    def _take(self, client: str, message: FromCoordinator) -> bool:
        match message:
            case Outputs():
                handles = np.frombuffer(message.handles, np.int64).tolist()
                token_ids = np.frombuffer(message.token_ids, np.int32).tolist()
                for handle, token_id in zip(handles, token_ids, strict=True):
                    self.tokens[handle].append(token_id)
                assert all(done.error is None for done in message.done)
                self.done |= {done.handle for done in message.done}
            case Stats() | PartitionReply():
                self._answers.append(message)
            case _:
                pass
        return True

    def _refuse(self, message: ToLauncher) -> None:
        raise AssertionError(f"no worker can be started or stopped here: {message}")
