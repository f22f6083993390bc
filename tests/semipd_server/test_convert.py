import dataclasses
from typing import Any

import pytest

from semipd_jax.client import Prompt
from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import (
    Delta,
    Event,
    Finished,
    FinishReason,
    SamplingParams,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from semipd_server.convert import (
    event_from,
    event_message,
    prompt_fields,
    prompt_from,
    sampling_from,
    sampling_message,
)
from semipd_server.pb import inference_pb2 as pb

EVENTS = [
    Started(prompt_tokens=7, cached_tokens=3, queue_s=0.25),
    Delta((1, 2), "日本", (TokenLogprob(1, -0.5, ((1, -0.5), (9, -2.0))), TokenLogprob(2, -1.0))),
    Delta((3,)),
    Finished(FinishReason.STOP, Usage(7, 3, 3), "stop!", Timings(0.25, 0.5, 0.75, 2)),
    Finished(FinishReason.STOP, Usage(7, 3), 0),
    Finished(FinishReason.LENGTH, Usage(7, 3)),
    Finished(FinishReason.ABORT, Usage(7, 0)),
]


@pytest.mark.parametrize("event", EVENTS)
def test_events_come_through_unchanged(event: Event):
    message = event_message(event, "id")
    assert event_from(pb.GenerateResponse.FromString(message.SerializeToString())) == event


@pytest.mark.parametrize(
    "prompt",
    [
        "日本",
        (5, 6),
        [
            {"role": "user", "content": "Hi", "name": "Ann"},
            {"role": "user", "content": "", "name": ""},
            {"role": "assistant", "content": "Hi, Ann"},
        ],
    ],
)
def test_prompts_come_through_unchanged(prompt: Prompt):
    message = pb.GenerateRequest(**prompt_fields(prompt))
    assert prompt_from(pb.GenerateRequest.FromString(message.SerializeToString())) == prompt


@pytest.mark.parametrize("field", [{"tool": "b"}, {"name": 5}])
def test_what_no_message_may_have_is_refused(field: dict[str, Any]):
    with pytest.raises(InvalidRequestError, match="a message is") as error:
        prompt_fields([{"role": "user", "content": "a"} | field])
    assert error.value.field == "chat"


def test_started_carries_the_request_id():
    assert event_message(EVENTS[0], "my id").started.request_id == "my id"


def test_sampling_fields_have_the_same_names_on_both_sides():
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} == ours


def test_every_scalar_tells_unset_from_zero():
    assert sampling_from(pb.SamplingParams()) == {}
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if not field.is_repeated and field.message_type is None:
            zero = pb.SamplingParams(**{field.name: field.default_value})
            assert sampling_from(zero) == {field.name: field.default_value}


def test_sampling_comes_through_unchanged():
    given = {
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 2**64 - 1,
        "stop": ("a", "日"),
        "stop_token_ids": (1, 2),
        "logit_bias": {3: -1.5},
        "ignore_eos": False,
    }
    assert sampling_from(sampling_message(given)) == given


@pytest.mark.parametrize(
    "form", [{"json": '{"type": "object"}'}, {"regex": "a+"}, {"choice": ("a", "日")}, {}]
)
def test_a_form_comes_through_unchanged(form: dict):
    message = sampling_message({"structured_outputs": form})
    assert sampling_from(message) == {"structured_outputs": form}


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", -1), ("max_tokens", 2**32), ("temperature", "hot"), ("best_of", 2)],
)
def test_what_the_contract_cannot_carry_is_refused_by_the_client(field: str, value: object):
    with pytest.raises(InvalidRequestError, match=field) as error:
        sampling_message({field: value})
    assert error.value.field == field
