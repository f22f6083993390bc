"""Bounds of the gRPC contract."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from server_rig import MAX_MODEL_LEN, Rig, Start, read_all

from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import MAX_LOGIT_BIAS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from semipd_server.limits import MAX_ENTRIES, check_entries
from semipd_server.pb import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]


def fields_of(message: Descriptor) -> list[FieldDescriptor]:
    """All fields of a message and of those in it, but not of map entries."""
    found = list(message.fields)
    for field in message.fields:
        inner = field.message_type
        if inner is not None and not inner.GetOptions().map_entry:
            found += fields_of(inner)
    return found


def test_every_repeated_field_of_a_request_has_a_bound():
    requests = [fields_of(method.input_type) for method in SERVICE.methods]
    repeated = {f.full_name for fields in requests for f in fields if f.is_repeated}
    assert repeated == set(MAX_ENTRIES)


def is_dangerous(field: FieldDescriptor) -> bool:
    """Whether it can carry a tensor, or name memory or files."""
    names = ("path", "file", "shm", "address", "url")
    return field.type == FieldDescriptor.TYPE_BYTES or any(w in field.name for w in names)


def test_no_field_can_carry_a_tensor_or_name_memory():
    for method in SERVICE.methods:
        assert [f.full_name for f in fields_of(method.input_type) if is_dangerous(f)] == []


def test_a_field_that_could_is_found():
    file = descriptor_pb2.FileDescriptorProto(name="bad.proto", package="bad")
    message = file.message_type.add(name="Request")
    for number, (name, kind) in enumerate((("embeddings", "BYTES"), ("shm_name", "STRING")), 1):
        message.field.add(
            name=name,
            number=number,
            type=getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind}"),
            label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = fields_of(pool.FindMessageTypeByName("bad.Request"))
    assert [field.name for field in found if is_dangerous(field)] == ["embeddings", "shm_name"]


AT_THE_BOUND: list[tuple[str, Any]] = [
    ("sampling.stop", lambda n: {"sampling": pb.SamplingParams(stop=["x"] * n)}),
    ("sampling.stop_token_ids", lambda n: {"sampling": pb.SamplingParams(stop_token_ids=[9] * n)}),
    (
        "sampling.logit_bias",
        lambda n: {"sampling": pb.SamplingParams(logit_bias=dict.fromkeys(range(n), 0.5))},
    ),
]
BOUNDS = (MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, MAX_LOGIT_BIAS)


async def ending(rig: Rig, call: Any) -> grpc.StatusCode:
    reader = asyncio.ensure_future(read_all(call))
    await rig.fake.until(reader.done)
    return (
        grpc.StatusCode.OK if reader.exception() is None else reader.exception().code()  # type: ignore
    )


@pytest.mark.parametrize(("case", "bound"), [*zip(AT_THE_BOUND, BOUNDS, strict=True)])
def test_at_the_bound_and_one_more(start: Start, case: tuple[str, Any], bound: int):
    name, fields = case

    async def main():
        async with start() as rig:
            for count, code in (
                (bound, grpc.StatusCode.OK),
                (bound + 1, grpc.StatusCode.INVALID_ARGUMENT),
            ):
                message = fields(count)
                message["sampling"].max_tokens = 1
                request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), **message)
                assert await ending(rig, rig.stub.Generate(request)) is code
            assert len(rig.fake.submitted) == 1

    asyncio.run(main())
    with pytest.raises(InvalidRequestError, match=f"{name} has {bound + 1} entries") as error:
        check_entries(pb.GenerateRequest(**fields(bound + 1)), MAX_MODEL_LEN)
    assert error.value.field == name
    assert f"at most {bound}" in str(error.value)


def test_token_ids_and_messages():
    for message, name in (
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 65)), "token_ids.ids"),
        (pb.DetokenizeRequest(ids=[5] * 65), "ids"),
        (
            pb.TokenizeRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage()] * 4097)),
            "chat.messages",
        ),
    ):
        with pytest.raises(InvalidRequestError) as error:
            check_entries(message, MAX_MODEL_LEN)
        assert error.value.field == name


def test_bounds_come_before_any_work(start: Start, monkeypatch: pytest.MonkeyPatch):
    """A message beyond them is neither tokenised nor copied."""

    async def main():
        async with start() as rig:
            monkeypatch.setattr(type(rig.engine), "generate", None)
            request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(stop=["x"] * 10_000))
            assert await ending(rig, rig.stub.Generate(request)) is (
                grpc.StatusCode.INVALID_ARGUMENT
            )

    asyncio.run(main())
