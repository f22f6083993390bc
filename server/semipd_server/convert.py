"""Protobuf messages to engine types and back. Field names are the same on both sides."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from google.protobuf.descriptor import FieldDescriptor

from semipd_jax.client import Prompt
from semipd_jax.client.sampling import parse_sampling
from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import (
    Delta,
    Event,
    Finished,
    FinishReason,
    Started,
    StructuredOutputs,
    Timings,
    TokenLogprob,
    Usage,
)
from semipd_jax.text.tokenizer import ChatMessage
from semipd_server.pb import inference_pb2 as pb

_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
_REASONS_BACK: Final = {value: reason for reason, value in _REASONS.items()}
_SAMPLING_FIELDS: Final = frozenset(f.name for f in pb.SamplingParams.DESCRIPTOR.fields)


# ---------------------------------------------------------------- requests


def prompt_from(request: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt:
    """Raises InvalidRequestError if there is no prompt."""
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text
    if kind == "chat":
        return [_chat_message_from(message) for message in request.chat.messages]
    if kind == "token_ids" and isinstance(request, pb.GenerateRequest):
        return tuple(request.token_ids.ids)
    allowed = [f.name for f in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
    raise InvalidRequestError(
        f"there is no prompt; set one of {', '.join(allowed)}", field="prompt"
    )


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the field of a request that takes it.

    Raises:
      InvalidRequestError: a message of a conversation has a field that does not exist, or that is
        no text.
    """
    if isinstance(prompt, str):
        return {"text": prompt}
    if len(prompt) and isinstance(prompt[0], Mapping):
        messages = map(_chat_message, cast(Sequence[ChatMessage], prompt))
        return {"chat": pb.ChatMessages(messages=messages)}
    return {"token_ids": pb.TokenIds(ids=cast(Sequence[int], prompt))}


def _chat_message_from(message: pb.ChatMessage) -> ChatMessage:
    written = {"role": message.role, "content": message.content}
    return written | {"name": message.name} if message.HasField("name") else written


def _chat_message(message: ChatMessage) -> pb.ChatMessage:
    try:
        return pb.ChatMessage(**message)
    except (TypeError, ValueError) as error:
        text = f"a message is {message!r:.80}: {error}"
        raise InvalidRequestError(text, field="chat") from error


def sampling_from(sampling: pb.SamplingParams) -> dict[str, Any]:
    """The fields that are set."""
    return {field.name: _value_from(field, value) for field, value in sampling.ListFields()}


def sampling_message(given: Mapping[str, Any]) -> pb.SamplingParams:
    """Raises InvalidRequestError for a name or a value that does not exist."""
    message = pb.SamplingParams()
    for name, value in parse_sampling(given).items():
        try:
            message.MergeFrom(pb.SamplingParams(**{name: _as_message(name, value)}))
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"{name} is {value!r:.80}: {error}", field=name) from error
    return message


def field_path(field: str) -> str:
    """Where a field that an InvalidRequestError names is found in a request."""
    return f"sampling.{field}" if field.partition(".")[0] in _SAMPLING_FIELDS else field


def _as_message(name: str, value: Any) -> Any:
    match value:
        case StructuredOutputs():
            choice = pb.Texts(texts=value.choice) if value.choice else None
            return pb.StructuredOutputs(json=value.json, regex=value.regex, choice=choice)
        case _:
            return dict(value) if name == "logit_bias" else value


def _value_from(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, pb.StructuredOutputs):
        forms = {field.name: form for field, form in value.ListFields()}
        return {n: tuple(f.texts) if isinstance(f, pb.Texts) else f for n, f in forms.items()}
    if field.message_type is not None:  # a map
        return dict(value)
    return tuple(value) if field.is_repeated else value


# ---------------------------------------------------------------- events


def event_message(event: Event, request_id: str) -> pb.GenerateResponse:
    match event:
        case Delta(token_ids=token_ids, text=text, logprobs=logprobs):
            delta = pb.Delta(
                token_ids=token_ids, text=text, logprobs=map(_logprob_message, logprobs)
            )
            return pb.GenerateResponse(delta=delta)
        case Started():
            started = pb.Started(
                request_id=request_id,
                prompt_tokens=event.prompt_tokens,
                cached_tokens=event.cached_tokens,
                queue_ms=1e3 * event.queue_s,
            )
            return pb.GenerateResponse(started=started)
        case Finished():
            return pb.GenerateResponse(finished=_finished_message(event))


def event_from(response: pb.GenerateResponse) -> Event:
    match response.WhichOneof("event"):
        case "delta":
            delta = response.delta
            return Delta(
                tuple(delta.token_ids), delta.text, tuple(map(_logprob_from, delta.logprobs))
            )
        case "started":
            started = response.started
            return Started(started.prompt_tokens, started.cached_tokens, started.queue_ms / 1e3)
        case "finished":
            return _finished_from(response.finished)
        case unknown:
            raise ValueError(f"the server sent an event of unknown kind {unknown}")


def _finished_message(event: Finished) -> pb.Finished:
    usage, timings, stop = event.usage, event.timings, event.matched_stop
    return pb.Finished(
        reason=_REASONS[event.reason],
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        ),
        stop_string=stop if isinstance(stop, str) else None,
        stop_token_id=stop if isinstance(stop, int) else None,
        timings=pb.Timings(
            queue_ms=1e3 * timings.queue_s,
            prefill_ms=1e3 * timings.prefill_s,
            decode_ms=1e3 * timings.decode_s,
            preemptions=timings.num_preemptions,
        ),
    )


def _finished_from(message: pb.Finished) -> Finished:
    usage, timings = message.usage, message.timings
    stop = message.WhichOneof("matched_stop")
    return Finished(
        reason=_REASONS_BACK[message.reason],
        usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        matched_stop=None if stop is None else getattr(message, stop),
        timings=Timings(
            queue_s=timings.queue_ms / 1e3,
            prefill_s=timings.prefill_ms / 1e3,
            decode_s=timings.decode_ms / 1e3,
            num_preemptions=timings.preemptions,
        ),
    )


def _logprob_message(logprob: TokenLogprob) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[pb.TopLogprob(token_id=i, logprob=value) for i, value in logprob.top],
    )


def _logprob_from(message: pb.TokenLogprobs) -> TokenLogprob:
    top = tuple((entry.token_id, entry.logprob) for entry in message.top)
    return TokenLogprob(message.token_id, message.logprob, top)
