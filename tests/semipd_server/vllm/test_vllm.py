"""vLLM's gRPC engine contract."""

import asyncio
import hashlib
import io
import json
import zipfile
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from server_rig import INFO, MAX_MODEL_LEN, Rig, Start, read_all
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from semipd_jax.client.sampling import check_sampling
from semipd_jax.config import SchedulerConfig
from semipd_jax.request import ANY_OBJECT, FinishReason, SamplingParams, StructuredOutputs
from semipd_server.limits import MAX_CHOICES
from semipd_server.vllm.convert import sampling_from
from semipd_server.vllm.limits import MAX_ENTRIES
from semipd_server.vllm.servicer import SERVICE

IDS = (5, 6, 7)


def request(*, stream: bool = True, request_id: str = "", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(input_ids=IDS),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )


def stub(rig: Rig) -> Any:
    return pb_grpc.VllmEngineStub(rig.channel)


async def answers(
    rig: Rig, message: pb.GenerateRequest, *, stepping: bool = True
) -> list[pb.GenerateResponse]:
    reading = asyncio.ensure_future(read_all(stub(rig).Generate(message)))
    await rig.fake.until(reading.done, stepping=stepping)
    return reading.result()  # pyright: ignore[reportReturnType]


async def ask(rig: Rig, name: str, message: Any, *, stepping: bool = True) -> Any:
    call = asyncio.ensure_future(getattr(stub(rig), name)(message))
    await rig.fake.until(call.done, stepping=stepping)
    return call.result()


async def refusal(
    rig: Rig, message: pb.GenerateRequest, *, stepping: bool = True
) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await answers(rig, message, stepping=stepping)
    return error.value.code(), error.value.details() or ""


def test_tokens_come_in_chunks_then_all_at_once(start: Start):
    async def main():
        async with start() as rig:
            *chunks, last = await answers(rig, request(max_tokens=6, logprobs=2))
            tokens = [t for c in chunks for t in c.chunk.token_ids]
            assert len(tokens) == 6
            assert [c.chunk.completion_tokens for c in chunks][-1] == 6
            assert {c.chunk.prompt_tokens for c in chunks} == {3}
            logprobs = chunks[0].chunk.output_logprobs
            assert logprobs.token_ids[0] == tokens[0]
            assert logprobs.token_logprobs[0] == -0.5
            assert len(logprobs.top_logprobs[0].token_ids) == 2
            complete = last.complete
            assert list(complete.output_ids) == tokens
            assert complete.finish_reason == "length"
            assert not complete.HasField("output_logprobs"), "all at once are too many for clients"
            assert (complete.prompt_tokens, complete.completion_tokens) == (3, 6)
            [only] = await answers(rig, request(max_tokens=6, logprobs=2, stream=False))
            assert list(only.complete.output_ids) == tokens
            assert list(only.complete.output_logprobs.token_ids) == tokens

    asyncio.run(main())


def test_choices_are_told_apart_and_seeds_differ(start: Start):
    async def main():
        async with start() as rig:
            found = await answers(rig, request(max_tokens=2, n=3, seed=-1, stream=False))
            assert sorted(a.complete.index for a in found) == [0, 1, 2]
            seeds = {submitted.sampling.seed for submitted in rig.fake.submitted}
            assert len(seeds) == 3

    asyncio.run(main())


def test_more_choices_than_the_queue_ever_takes_are_refused(start: Start):
    async def main():
        async with start(limits=SchedulerConfig(max_num_queued_reqs=2)) as rig:
            code, text = await refusal(rig, request(max_tokens=1, n=3))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "n is 3" in text
            assert "at most 2" in text
            assert rig.fake.submitted == []
            assert await answers(rig, request(max_tokens=1, n=2))

    asyncio.run(main())


def test_stop_tokens_and_strings_are_named(start: Start):
    async def main():
        async with start() as rig:
            first = (await answers(rig, request(max_tokens=1)))[-1].complete.output_ids[0]
            found = (await answers(rig, request(max_tokens=9, stop_token_ids=[first])))[-1]
            assert found.complete.finish_reason == "stop"
            assert found.complete.matched_token_id == first
            text = rig.engine.tokenizer.decode([first])
            found = (await answers(rig, request(max_tokens=9, stop=[text])))[-1]
            assert found.complete.matched_stop_str == text

    asyncio.run(main())


def test_zeros_mean_what_vllm_means_by_them():
    """An empty message is vLLM's default sampling, whatever the model's own defaults are."""
    fields, _ = sampling_from(pb.SamplingParams(skip_special_tokens=True))
    model = {"temperature": 0.3, "top_p": 0.5, "top_k": 7, "repetition_penalty": 1.3}
    checked = check_sampling(fields, model, vocab_size=400)
    found = checked.after(IDS, vocab_size=400, max_model_len=64)
    assert found == SamplingParams(max_tokens=61)


@pytest.mark.parametrize(
    ("constraint", "form"),
    [
        ({"json_schema": '{"type": "string"}'}, StructuredOutputs(json='{"type": "string"}')),
        ({"json_object": True}, StructuredOutputs(json=ANY_OBJECT)),
        ({"regex": "a+"}, StructuredOutputs(regex="a+")),
        (
            {"choice": pb.ChoiceConstraint(choices=["yes", "no"])},
            StructuredOutputs(choice=("yes", "no")),
        ),
    ],
)
def test_constraints_are_forms(start: Start, constraint: dict[str, Any], form: StructuredOutputs):
    async def main():
        async with start() as rig:
            await answers(rig, request(max_tokens=1, **constraint))
            assert rig.fake.submitted[0].sampling.structured_outputs == form

    asyncio.run(main())


async def begun(rig: Rig, call: Any, num_choices: int) -> None:
    """Reads the first of a call's tokens, when there is one of each choice and no more."""
    await rig.fake.until(lambda: len(rig.fake.running) == num_choices, stepping=False)
    rig.fake.step()
    first = asyncio.ensure_future(call.read())
    await rig.fake.until(first.done, stepping=False)


@pytest.mark.parametrize("is_draining", [False, True])
def test_abort_ends_the_stream(start: Start, is_draining: bool):
    async def main():
        async with start() as rig:
            call = stub(rig).Generate(request(max_tokens=60, n=2, request_id="r"))
            await begun(rig, call, 2)
            if is_draining:
                rig.front_end.gate.close("the server is shutting down")
                code, _ = await refusal(rig, request(), stepping=False)
                assert code is grpc.StatusCode.UNAVAILABLE
            message = pb.AbortRequest(request_ids=["r", "unknown"])
            await ask(rig, "Abort", message, stepping=False)
            rest = asyncio.ensure_future(read_all(call))
            await rig.fake.until(rest.done, stepping=False)
            ends = [a.complete for a in rest.result() if a.HasField("complete")]
            assert [end.finish_reason for end in ends] == ["abort", "abort"]

    asyncio.run(main())


def test_leaving_aborts(start: Start):
    async def main():
        async with start() as rig:
            call = stub(rig).Generate(request(max_tokens=60))
            await begun(rig, call, 1)
            call.cancel()
            await rig.fake.until(lambda: not rig.fake.running, stepping=False)
            assert rig.fake.aborted == [FinishReason.ABORT]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (request(temperature=-1.0), "sampling_params.temperature"),
        (request(n=MAX_CHOICES + 1), "sampling_params.n"),
        (request(prompt_logprobs=1), "sampling_params.prompt_logprobs"),
        (request(stop=["x"] * 17), "sampling_params.stop"),
        (request(stop_token_ids=[10**6]), "sampling_params.stop_token_ids"),
        (request(json_schema="{"), "sampling_params.json_schema"),
        (request(regex="x" * 5000), "sampling_params.regex"),
        (request(choice=pb.ChoiceConstraint(choices=[""])), "sampling_params.choice.choices"),
        (request(request_id="x" * 200), "request_id"),
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[10**6])), "input"),
    ],
)
def test_a_bad_field_has_its_name_in_this_contract(
    start: Start, message: pb.GenerateRequest, field: str
):
    async def main():
        async with start() as rig:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await answers(rig, message)
            status, bad = rpc_status.from_call(error.value), error_details_pb2.BadRequest()
            assert status is not None
            assert status.details[0].Unpack(bad)
            assert [violation.field for violation in bad.field_violations] == [field]
            step: Any = pb.GenerateRequest.DESCRIPTOR
            for name in field.split("."):
                found = step.fields_by_name.get(name) or step.oneofs_by_name[name]
                step = getattr(found, "message_type", None)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"n": MAX_CHOICES + 1}, "n is 17"),
        ({"prompt_logprobs": 1}, "prompt_logprobs is set"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens is set"),
        ({"grammar": "x"}, "grammar is set"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"stop": ["x"] * 17}, "sampling_params.stop has 17 entries"),
        ({"stop_token_ids": [1] * 65}, "sampling_params.stop_token_ids has 65 entries"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "sampling_params.logit_bias has 301"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias is -1"),
    ],
)
def test_what_cannot_be_served_is_refused(start: Start, sampling: dict[str, Any], named: str):
    async def main():
        async with start() as rig:
            code, text = await refusal(rig, request(**sampling))
            assert (code, named in text) == (grpc.StatusCode.INVALID_ARGUMENT, True), text

    asyncio.run(main())


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(),
        pb.GenerateRequest(tokenized=pb.TokenizedInput()),
        pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1] * (MAX_MODEL_LEN + 1))),
        pb.GenerateRequest(text="x", mm_inputs=pb.MultimodalInputs()),
        pb.GenerateRequest(text="x", mm_inputs=pb.MultimodalInputs(mm_hashes=["x"])),
        pb.GenerateRequest(text="x", media_refs=pb.MediaRefs()),
        pb.GenerateRequest(text="x", kv_transfer_params_json="{}"),
        pb.GenerateRequest(text="x", extra_mm_inputs=[pb.MultimodalInputs()]),
    ],
)
def test_what_is_no_prompt_is_refused(start: Start, message: pb.GenerateRequest):
    async def main():
        async with start() as rig:
            code, _ = await refusal(rig, message)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert rig.fake.submitted == []

    asyncio.run(main())


_READ = ("TokenizedInput", "SamplingParams", "ChoiceConstraint")


def test_every_repeated_field_that_is_read_has_a_bound():
    read = {f"{SERVICE.rsplit('.', 1)[0]}.{name}" for name in _READ}
    methods = pb.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name
    read |= {methods[name].input_type.full_name for name in ("Abort", "GetLoads")}
    assert {name.rpartition(".")[0] for name in MAX_ENTRIES} <= read
    for name in (*_READ, "AbortRequest", "GetLoadsRequest"):
        message = getattr(pb, name)
        assert repeated(message.DESCRIPTOR) <= set(MAX_ENTRIES)


def repeated(message: Descriptor) -> set[str]:
    fields: list[FieldDescriptor] = list(message.fields)
    return {field.full_name for field in fields if field.is_repeated}


def test_the_tokenizer_comes_as_a_zip(start: Start, model_dir: str):
    async def main():
        async with start(path=model_dir) as rig:
            call = stub(rig).GetTokenizer(common.GetTokenizerRequest())
            pieces: list[Any] = await read_all(call)
            data = b"".join(piece.data for piece in pieces)
            assert [bool(piece.sha256) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            assert pieces[-1].sha256 == hashlib.sha256(data).hexdigest()
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                assert {"tokenizer.json", "config.json"} <= set(archive.namelist())
                assert json.loads(archive.read("tokenizer.json"))

    asyncio.run(main())


def test_gateways_are_told_what_there_is(start: Start):
    async def main():
        async with start() as rig:
            model = await ask(rig, "GetModelInfo", pb.GetModelInfoRequest())
            assert (model.served_model_name, model.is_generation) == (INFO.name, True)
            assert model.max_context_length == MAX_MODEL_LEN
            rig.fake.state = {"num_running": 2, "num_waiting": 3, "num_free_pages": 40}
            server = await ask(rig, "GetServerInfo", pb.GetServerInfoRequest())
            assert (server.active_requests, server.max_num_seqs) == (5, 8)
            [load] = (await ask(rig, "GetLoads", pb.GetLoadsRequest())).loads
            assert (load.num_running_reqs, load.num_waiting_reqs) == (2, 3)
            assert load.token_usage == pytest.approx(0.6)
            assert (await ask(rig, "HealthCheck", pb.HealthCheckRequest())).healthy
            health: Any = health_pb2_grpc.HealthStub(rig.channel)
            status = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert status.status == health_pb2.HealthCheckResponse.SERVING
            rig.front_end.gate.close("the server is shutting down")
            found = await ask(rig, "HealthCheck", pb.HealthCheckRequest())
            assert (found.healthy, found.message) == (False, "the server is shutting down")

    asyncio.run(main())


@pytest.mark.parametrize("name", ["Embed", "FlushCache", "StartProfile", "StopProfile"])
def test_what_is_not_there_says_so(start: Start, name: str):
    async def main():
        async with start() as rig:
            kind = pb.EmbedRequest if name == "Embed" else getattr(common, f"{name}Request")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await ask(rig, name, kind())
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(main())
