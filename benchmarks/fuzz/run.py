"""Sends inputs and judges the answers: a success, or the client's fault, and never silence."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import httpx2
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.fuzz import inputs
from semipd_server.pb import inference_pb2 as pb
from semipd_server.settings import vllm_is_installed

_ROUTES: Final = (
    *("/v1/completions", "/v1/chat/completions", "/v1/completions", "/v1/chat/completions"),
    *("/tokenize", "/detokenize", "/absent"),
)
_CALLERS_FAULT: Final = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_BATCH: Final = 500
_AT_A_TIME: Final = 32
_TIMEOUT_S: Final = 30.0
_SHOWN: Final = 400


@dataclass(slots=True)
class Outcome:
    """Answers by surface and status, and what should not have been answered so."""

    answers: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])


async def fuzz(
    target: str, url: str, *, num_inputs: int, first_seed: int = 0, batch: int = _BATCH
) -> Outcome:
    """Half of the inputs go to gRPC, half to HTTP, by turns of a batch. The same seed makes the
    same inputs."""
    outcome = Outcome()
    async with (
        grpc.aio.insecure_channel(target) as channel,
        httpx2.AsyncClient(base_url=url, timeout=_TIMEOUT_S) as client,
    ):
        makers: list[Callable[[int, int], Iterator[Any]]] = [
            lambda seed, n: _http_work(client, seed, n, outcome),
            lambda seed, n: _grpc_work(channel, seed, n, outcome),
        ]
        left = num_inputs
        for number, make in zip(itertools.count(first_seed), itertools.cycle(makers)):
            if left <= 0 or outcome.wrong:
                return outcome
            await _all(make(number, min(left, batch)))
            left -= batch
    return outcome


async def _all(work: Iterator[Any]) -> None:
    free = asyncio.Semaphore(_AT_A_TIME)

    async def one(task: Any) -> None:
        async with free:
            await task

    await asyncio.gather(*map(one, work))


def _http_work(client: httpx2.AsyncClient, number: int, n: int, outcome: Outcome) -> Iterator[Any]:
    kinds = [st.tuples(inputs.json_bytes(route), inputs.headers()) for route in _ROUTES]
    for batch in zip(*_draws(kinds, number, n), strict=True):
        for route, (text, headers) in zip(_ROUTES, batch, strict=True):
            yield _post(client, route, text, headers, outcome)


async def _post(
    client: httpx2.AsyncClient,
    route: str,
    data: bytes,
    odd: dict[bytes, bytes],
    outcome: Outcome,
) -> None:
    headers = {b"content-type": b"application/json"} | odd
    sent = f"POST {route} {odd} {data[:_SHOWN]!r}"
    try:
        reply = await client.post(route, content=data, headers=headers)
    except httpx2.HTTPError as error:
        outcome.wrong.append(f"{sent}: {error!r}")
        return
    outcome.answers[f"POST {route} {reply.status_code}"] += 1
    is_error = reply.status_code >= 400
    if reply.status_code >= 500 or (is_error and not reply.json()["error"]["message"]):
        outcome.wrong.append(f"{sent}: {reply.status_code} {reply.text}")


def _grpc_work(channel: grpc.aio.Channel, number: int, n: int, outcome: Outcome) -> Iterator[Any]:
    methods = _methods()
    kinds = [st.tuples(inputs.message_bytes(m.input_type), inputs.metadata()) for m in methods]
    for batch in zip(*_draws(kinds, number, n), strict=True):
        for method, (message, metadata) in zip(methods, batch, strict=True):
            yield _call(channel, method, message, metadata, outcome)


def _methods() -> list[MethodDescriptor]:
    services = [
        pb.DESCRIPTOR.services_by_name["InferenceService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    ]
    if vllm_is_installed():
        from smg_grpc_proto.generated import vllm_engine_pb2

        services.append(vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"])
    methods = [m for service in services for m in service.methods if m.name != "Watch"]
    return methods + 2 * [method for method in methods if method.name == "Generate"]


async def _call(
    channel: grpc.aio.Channel,
    method: MethodDescriptor,
    data: bytes,
    metadata: tuple[tuple[str, str | bytes], ...],
    outcome: Outcome,
) -> None:
    """Bytes as they are, whatever the answer's form."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    call = channel.unary_stream(name)(data, metadata=metadata, timeout=_TIMEOUT_S)
    try:
        async for _ in call:
            pass
        status = grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        status = error.code()
        if status not in _CALLERS_FAULT:
            sent = f"{name} {metadata} {data[:_SHOWN]!r}"
            outcome.wrong.append(f"{sent}: {status} {error.details()}")
    outcome.answers[f"{name} {status.name}"] += 1


def _draws[T](strategies: list[st.SearchStrategy[T]], number: int, n: int) -> list[list[T]]:
    """About `n` examples, as many of each strategy, from a seed of its own."""
    each, first = n // len(strategies) + 1, number * len(strategies)
    return [_draw(strategy, first + i, each) for i, strategy in enumerate(strategies)]


def _draw[T](strategy: st.SearchStrategy[T], number: int, n: int) -> list[T]:
    """`n` examples; the same number makes the same ones."""
    found: list[T] = []

    @seed(number)
    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(strategy)
    def draw(value: T) -> None:
        found.append(value)

    draw()
    return [value for _, value in zip(range(n), itertools.cycle(found))]
