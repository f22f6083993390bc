"""What one client may not have at the cost of others: a better place in the queue, or for ever."""

import asyncio
from typing import Any

import grpc
import openai
import pytest
from openai_rig import openai_client
from server_rig import Rig, Start, read_all

from semipd_jax.errors import RequestTimeoutError
from semipd_jax.request import FinishReason
from semipd_server.pb import inference_pb2 as pb
from semipd_server.settings import Settings

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": [5, 6], "max_tokens": 40}


def ask(**fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=40, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), sampling=sampling, **fields)


async def until_aborted(rig: Rig, num: int) -> None:
    await rig.fake.until(lambda: len(rig.fake.aborted) == num, stepping=False)
    assert rig.fake.aborted == [FinishReason.ABORT] * num


def test_nobody_asks_for_a_better_place_than_the_operator_allows(start: Start):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await read_all(rig.stub.Generate(ask(priority=-1)))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert refused.value.details() == "priority is -1; allowed: 0 and above"
            with pytest.raises(openai.BadRequestError, match="allowed: 0 and above") as error:
                await client.completions.create(**COMPLETION, extra_body={"priority": -1})
            assert error.value.param == "priority"
            assert rig.fake.submitted == []

    asyncio.run(main())


@pytest.mark.parametrize("steps", [False, True])
def test_no_request_lasts_longer_than_the_operator_allows(start: Start, steps: bool):
    """In the queue, or after its first tokens."""

    async def main():
        settings = Settings(port=0, http_port=0, request_timeout=0.5)
        async with start(settings=settings) as rig, openai_client(rig) as client:
            answer = asyncio.ensure_future(read_all(rig.stub.Generate(ask())))
            await rig.fake.until(lambda: len(rig.fake.submitted) == 1, stepping=steps)
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await asyncio.wait_for(answer, 30)
            await until_aborted(rig, 1)
            assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert ended.value.details() == (
                "the request took longer than 0.5 s, the most that is allowed"
            )
            with pytest.raises(RequestTimeoutError, match=r"longer than 0\.5 s"):
                await asyncio.wait_for(rig.client.complete([5, 6], max_tokens=40), 30)
            await until_aborted(rig, 2)
            with pytest.raises(openai.APIStatusError, match=r"longer than 0\.5 s") as error:
                await asyncio.wait_for(client.completions.create(**COMPLETION), 30)
            await until_aborted(rig, 3)
            assert (error.value.status_code, error.value.code) == (504, "request_timeout")
            assert len(rig.fake.submitted) == 3, "nobody asked for the same again"

    asyncio.run(main())
