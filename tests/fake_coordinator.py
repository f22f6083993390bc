"""The coordinator's side of the link, without an engine: one token per request and step."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from semipd_jax.messages import (
    Abort,
    Admitted,
    Done,
    FromCoordinator,
    GetStats,
    MemoryLayout,
    Outputs,
    Partition,
    PartitionReply,
    PhaseShares,
    PredictionError,
    RecentRequests,
    Refused,
    SetPartition,
    SetSlo,
    Slo,
    SloCounts,
    Stats,
    Submit,
    ToCoordinator,
)
from semipd_jax.request import FinishReason, Request, Timings, TokenLogprob
from semipd_jax.transport.channels import CLIENTS, Hub

_SHARES = PhaseShares(asked=1.0, current=1.0, warm=(0.5, 1.0), num_switches=0)
PARTITION = Partition(
    policy="static", prefill=_SHARES, decode=_SHARES, slos=(Slo(),), slo_target=0.9
)
TIMINGS = Timings(queue_s=0.001, prefill_s=0.002, decode_s=0.003)


def layout(vocab_size: int = 1000, max_model_len: int = 256, eos: tuple[int, ...] = ()):
    return MemoryLayout(
        dtype="float32",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        page_size=16,
        num_pages=101,
        num_rows=9,
        weight_bytes=0,
        kv_bytes=0,
        eos_token_ids=eos,
    )


def stats(**fields: Any) -> Stats:
    """An idle engine of 100 pages, but for `fields`."""
    zeros = {f: 0 for f in Stats.__struct_fields__ if f.startswith(("num_", "prefix_"))}
    idle: dict[str, Any] = {
        "query_id": 0,
        "time_s": 0.0,
        "partition": PARTITION,
        "num_pages": 100,
        "num_free_pages": 100,
        "max_plan_s": 0.0,
        "mean_plan_s": 0.0,
        "slo": SloCounts(0, 0, 0, 0),
        "recent": RecentRequests(60.0, 0, 0, None, None),
        "prefill_error": PredictionError(0, 0.0),
        "decode_error": PredictionError(0, 0.0),
    }
    return Stats(**(zeros | idle | fields))


def arithmetic(request: Request, position: int) -> int:
    """A token that depends on the prompt, so that mixed-up streams show. Never 0 or 1."""
    return 2 + (sum(request.prompt_token_ids) + position) % 95


@dataclass
class Running:
    client: str
    handle: int
    request: Request
    num_output: int = 0


@dataclass
class FakeCoordinator:
    """Answers what was submitted with `answer(request, position)`.

    Attributes:
      refuse: answer to every Submit instead of running it: its message.
      fail_after: give up on requests after this many tokens.
      admits: else requests stay in the queue.
      state: fields of the `Stats` that are told.
      cannot: why it makes no change to the partition; what was asked for is in `changes`.
    """

    run_dir: str
    answer: Callable[[Request, int], int] = arithmetic
    refuse: str | None = None
    fail_after: int | None = None
    admits: bool = True
    running: dict[tuple[str, int], Running] = field(default_factory=dict)
    submitted: list[Request] = field(default_factory=list)
    aborted: list[FinishReason] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    cannot: str | None = None
    changes: list[SetPartition | SetSlo] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hub = Hub[ToCoordinator, FromCoordinator](self.run_dir, CLIENTS, ToCoordinator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.close()

    async def serve(self, interval_s: float = 0.001) -> None:
        """Steps for ever."""
        while True:
            self.step()
            await asyncio.sleep(interval_s)

    async def until(
        self, condition: Callable[[], bool], *, stepping: bool = True, timeout_s: float = 60.0
    ) -> None:
        """Takes messages (and steps) until `condition` holds."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.step() if stepping else self.receive()
                await asyncio.sleep(0.0005)

    def step(self) -> None:
        self.receive()
        by_client: dict[str, list[Running]] = {}
        for running in self.running.values():
            by_client.setdefault(running.client, []).append(running)
        for client, group in by_client.items():
            self.hub.send(client, self._outputs(group))

    def receive(self) -> None:
        for client, message in self.hub.receive():
            match message:
                case Submit(handle=handle, request=request):
                    self._submit(client, handle, request)
                case Abort(handle=handle, reason=reason):
                    self.aborted.append(reason)
                    if self.running.pop((client, handle), None):
                        self.hub.send(client, _outputs([], [], [], [_done(handle, reason)]))
                case GetStats(query_id=query_id):
                    self.hub.send(client, self._stats(query_id))
                case SetPartition(query_id=query_id) | SetSlo(query_id=query_id):
                    self.changes.append(message)
                    self.hub.send(client, PartitionReply(query_id, PARTITION, self.cannot))

    def _submit(self, client: str, handle: int, request: Request) -> None:
        self.submitted.append(request)
        if self.refuse is not None:
            self.hub.send(client, Refused(handle, self.refuse))
            return
        self.running[client, handle] = Running(client, handle, request)
        if self.admits:
            self.hub.send(client, Admitted(handle, cached_tokens=0, queue_s=0.001))

    def _outputs(self, group: list[Running]) -> Outputs:
        handles, token_ids, logprobs, done = [], [], [], []
        for running in group:
            if running.num_output == self.fail_after:
                done.append(_done(running.handle, FinishReason.ABORT, error="the worker crashed"))
                del self.running[running.client, running.handle]
                continue
            token_id = self.answer(running.request, running.num_output)
            running.num_output += 1
            if (count := running.request.sampling.logprobs) is not None:
                top = tuple((token_id + i, -0.5 - i) for i in range(count))
                logprobs.append((len(handles), TokenLogprob(token_id, -0.5, top)))
            handles.append(running.handle)
            token_ids.append(token_id)
            if (end := _ending(running, token_id)) is not None:
                done.append(end)
                del self.running[running.client, running.handle]
        return _outputs(handles, token_ids, logprobs, done)

    def _stats(self, query_id: int) -> Stats:
        return stats(**({"query_id": query_id, "num_running": len(self.running)} | self.state))


def _ending(running: Running, token_id: int) -> Done | None:
    sampling = running.request.sampling
    if token_id in sampling.stop_token_ids:
        return _done(running.handle, FinishReason.STOP, stop_token_id=token_id)
    if running.num_output == sampling.max_tokens:
        return _done(running.handle, FinishReason.LENGTH)
    return None


def _done(
    handle: int,
    reason: FinishReason,
    *,
    stop_token_id: int | None = None,
    error: str | None = None,
) -> Done:
    return Done(handle, reason, TIMINGS, 0, stop_token_id, error)


def _outputs(
    handles: list[int],
    token_ids: list[int],
    logprobs: list[tuple[int, TokenLogprob]],
    done: list[Done],
) -> Outputs:
    return Outputs(
        np.array(handles, np.int64).tobytes(),
        np.array(token_ids, np.int32).tobytes(),
        logprobs,
        done,
    )
