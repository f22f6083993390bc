import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from benchmarks.load import RequestError, Send, run_load
from benchmarks.metrics import OK, RequestRecord
from benchmarks.workload import PlannedRequest


def planned(arrival_s: float, output_len: int = 3) -> PlannedRequest:
    return PlannedRequest(arrival_s=arrival_s, prompt_token_ids=(1, 2), output_len=output_len)


def run(requests: list[PlannedRequest], send: Send, timeout_s: float = 30) -> list[RequestRecord]:
    done = asyncio.run(run_load(requests, send, request_timeout_s=timeout_s))
    assert done.health.send_lag_ms is not None
    assert done.health.send_lag_ms.count == len(requests)
    return done.records


def test_records_what_came() -> None:
    async def send(request: PlannedRequest) -> AsyncGenerator[Sequence[int]]:
        yield ()  # a message without tokens is no arrival
        yield (5,)
        yield (6, 7)

    (record,) = run([planned(0.0)], send)
    assert record.status == OK
    assert record.token_ids == [5, 6, 7]
    assert [a.num_tokens for a in record.arrivals] == [1, 2]
    assert record.num_prompt_tokens == 2
    times = [record.scheduled_s, record.sent_s, *(a.at_s for a in record.arrivals)]
    assert times == sorted(times)
    assert record.finished_s >= times[-1]


def test_a_request_goes_out_although_the_one_before_it_is_not_answered() -> None:
    async def send(request: PlannedRequest) -> AsyncGenerator[Sequence[int]]:
        if request.arrival_s == 0.0:
            await second_was_sent.wait()
        else:
            second_was_sent.set()
        yield (1, 2, 3)

    second_was_sent = asyncio.Event()
    first, second = run([planned(0.02), planned(0.0)], send)  # given out of order
    assert first.status == second.status == OK
    assert second.scheduled_s - first.scheduled_s == pytest.approx(0.02)
    assert first.sent_s >= first.scheduled_s
    assert second.sent_s >= second.scheduled_s


def test_failures_are_recorded_by_status() -> None:
    async def send(request: PlannedRequest) -> AsyncGenerator[Sequence[int]]:
        yield (1,)
        if request.output_len == 2:
            raise RequestError("UNAVAILABLE")
        if request.output_len == 3:
            await asyncio.Event().wait()

    records = run([planned(0.0, output_len=n) for n in (1, 2, 3, 4)], send, timeout_s=0.5)
    statuses = [r.status for r in records]
    assert statuses == [OK, "UNAVAILABLE", "DEADLINE_EXCEEDED", "WRONG_LENGTH"]
    assert [r.token_ids for r in records] == [[1]] * 4
