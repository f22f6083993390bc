"""Open-loop load: requests go out when the arrival process says, whatever came back meanwhile.

The generator watches itself: how late requests were sent, how late its event loop woke up (which
bounds the error of every time it reports) and how much CPU it took from the server.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from benchmarks.metrics import Arrival, Distribution, RequestRecord, distribution_ms
from benchmarks.workload import PlannedRequest

type Send = Callable[[PlannedRequest], AsyncGenerator[Sequence[int]]]
"""Sends a request; yields the new token ids of each message. Raises RequestError if it fails."""

_PROBE_S: Final = 0.005


class RequestError(Exception):
    """A request ended without its answer. `status` names how, as the server's interface does."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """How far the generator itself was late or in the way.

    Attributes:
      send_lag_ms: from when a request was due to when it was sent.
      loop_lag_ms: by how much a sleeping task of the same event loop overslept.
      cpu_share: CPU seconds of this process for each second of the run.
    """

    send_lag_ms: Distribution | None
    loop_lag_ms: Distribution | None
    cpu_share: float


@dataclass(frozen=True, slots=True)
class LoadRun:
    """`records` in the order in which the requests were due."""

    records: list[RequestRecord]
    health: GeneratorHealth


async def run_load(
    planned: Sequence[PlannedRequest], send: Send, *, request_timeout_s: float
) -> LoadRun:
    """Sends everything when it is due; returns when every request has ended.

    A request that takes longer than `request_timeout_s` is given up as DEADLINE_EXCEEDED.
    """
    oversleeps: list[float] = []
    cpu_s, start_s = time.process_time(), time.perf_counter()
    probe = asyncio.create_task(_measure_oversleep(oversleeps))
    try:
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[RequestRecord]] = []
            for request in sorted(planned, key=lambda p: p.arrival_s):
                due_s = start_s + request.arrival_s
                if (early_s := due_s - time.perf_counter()) > 0:
                    await asyncio.sleep(early_s)
                tasks.append(group.create_task(_run_one(request, send, due_s, request_timeout_s)))
    finally:
        probe.cancel()
    records = [task.result() for task in tasks]
    elapsed_s = time.perf_counter() - start_s
    health = GeneratorHealth(
        send_lag_ms=distribution_ms(r.sent_s - r.scheduled_s for r in records),
        loop_lag_ms=distribution_ms(oversleeps),
        cpu_share=(time.process_time() - cpu_s) / elapsed_s,
    )
    return LoadRun(records, health)


async def _run_one(
    request: PlannedRequest, send: Send, due_s: float, timeout_s: float
) -> RequestRecord:
    record = RequestRecord(
        scheduled_s=due_s,
        sent_s=time.perf_counter(),
        num_prompt_tokens=len(request.prompt_token_ids),
    )
    try:
        async with asyncio.timeout(timeout_s), aclosing(send(request)) as messages:
            async for token_ids in messages:
                if token_ids:
                    record.arrivals.append(Arrival(time.perf_counter(), len(token_ids)))
                    record.token_ids += token_ids
        if len(record.token_ids) != request.output_len:
            record.status = "WRONG_LENGTH"
    except RequestError as error:
        record.status = error.status
    except TimeoutError:
        record.status = "DEADLINE_EXCEEDED"
    record.finished_s = time.perf_counter()
    return record


async def _measure_oversleep(oversleeps: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + _PROBE_S
        await asyncio.sleep(_PROBE_S)
        oversleeps.append(time.perf_counter() - due_s)
