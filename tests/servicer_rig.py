"""Calls of the gRPC service, as tests make and read them."""

import asyncio
from typing import Any

import grpc
import pytest
from server_rig import Rig, read_all

from semipd_server.pb import inference_pb2 as pb


def ids(*token_ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=token_ids)


def request(**fields: Any) -> pb.GenerateRequest:
    fields = {"token_ids": ids(5, 6, 7)} | fields
    return pb.GenerateRequest(sampling=pb.SamplingParams(**fields.pop("sampling", {})), **fields)


async def responses(rig: Rig, call: Any) -> list[pb.GenerateResponse]:
    """The rest of a call's, while the coordinator steps."""
    reader = asyncio.ensure_future(read_all(call))
    await rig.fake.until(reader.done)
    return reader.result()


async def error_of(rig: Rig, call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    ending = responses(rig, call) if hasattr(call, "read") else call
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ending
    return raised.value


async def running(rig: Rig, call: Any) -> None:
    """Waits until the coordinator has the request, without a step."""
    first = asyncio.ensure_future(call.read())
    await rig.fake.until(first.done, stepping=False)
    assert first.result().WhichOneof("event") == "started"
