"""Messages of `vllm.grpc.engine` to engine types and back."""

from collections.abc import Sequence
from typing import Any, Final

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from semipd_jax.client import Prompt
from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import ANY_OBJECT, Finished, TokenLogprob
from semipd_server.choices import seeds_of
from semipd_server.limits import MAX_CHOICES

_UNSUPPORTED: Final = (
    *("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "media_refs"),
    "data_parallel_rank",
)
_SAMPLING_FIELDS: Final = frozenset((*pb.SamplingParams.DESCRIPTOR.fields_by_name, "constraint"))
_NAMES: Final = {
    "prompt": "input",
    "include_stop": "include_stop_str_in_output",
    "structured_outputs": "constraint",
    "structured_outputs.json": "json_schema",
    "structured_outputs.regex": "regex",
    "structured_outputs.choice": "choice.choices",
}
"""The engine's → this contract's, where they differ."""
_UNSUPPORTED_SAMPLING: Final = ("prompt_logprobs", "truncate_prompt_tokens")


def field_path(field: str) -> str:
    """Where a field that an InvalidRequestError names is in a GenerateRequest."""
    name = _NAMES.get(field, field)
    return f"sampling_params.{name}" if name.partition(".")[0] in _SAMPLING_FIELDS else name


def prompt_from(request: pb.GenerateRequest) -> Prompt:
    """Raises InvalidRequestError if there is no prompt, or more than a prompt."""
    for name in _UNSUPPORTED:
        if request.HasField(name):
            raise InvalidRequestError(f"{name} is set; allowed: text and token ids", field=name)
    match request.WhichOneof("input"):
        case "tokenized":
            return tuple(request.tokenized.input_ids)
        case "text":
            return request.text
    raise InvalidRequestError("there is no prompt; set tokenized or text", field="input")


def sampling_from(params: pb.SamplingParams) -> tuple[dict[str, Any], list[int | None]]:
    """What the choices share, and the seeds of the `n` choices. As in vLLM, zero is the value that
    it is, except that a `top_p` or a `repetition_penalty` of zero is unset: the gateway applies the
    model's defaults.

    Raises:
      InvalidRequestError: a field is not supported, or `n` is out of range.
    """
    for name in _UNSUPPORTED_SAMPLING:
        if params.HasField(name):
            raise InvalidRequestError(f"{name} is set; allowed: unset", field=name)
    n = params.n or 1
    if n > MAX_CHOICES:
        raise InvalidRequestError(f"n is {n}; allowed: 1 to {MAX_CHOICES}", field="n")
    fields = {
        "temperature": params.temperature if params.HasField("temperature") else 1.0,
        "top_p": params.top_p or 1.0,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty or 1.0,
        "max_tokens": params.max_tokens if params.HasField("max_tokens") else None,
        "min_tokens": params.min_tokens,
        "stop": tuple(params.stop),
        "include_stop": params.include_stop_str_in_output,
        "stop_token_ids": tuple(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
        "logit_bias": dict(params.logit_bias),
        "logprobs": params.logprobs if params.HasField("logprobs") else None,
        "skip_special_tokens": params.skip_special_tokens,
        "structured_outputs": _form(params),
    }
    return fields, seeds_of(params.seed if params.HasField("seed") else None, n)


def _form(params: pb.SamplingParams) -> dict[str, Any] | None:
    match params.WhichOneof("constraint"):
        case None:
            return None
        case "json_schema":
            return {"json": params.json_schema}
        case "json_object":
            return {"json": ANY_OBJECT} if params.json_object else None
        case "regex":
            return {"regex": params.regex}
        case "choice":
            return {"choice": tuple(params.choice.choices)}
        case name:
            raise InvalidRequestError(f"{name} is set; allowed: unset", field=name)


def logprobs_message(logprobs: Sequence[TokenLogprob]) -> pb.OutputLogProbs | None:
    if not logprobs:
        return None
    tops = [zip(*logprob.top, strict=True) if logprob.top else ((), ()) for logprob in logprobs]
    return pb.OutputLogProbs(
        token_logprobs=[logprob.logprob for logprob in logprobs],
        token_ids=[logprob.token_id for logprob in logprobs],
        top_logprobs=[pb.TopLogProbs(token_ids=ids, values=values) for ids, values in tops],
    )


def stop_fields(finished: Finished) -> dict[str, Any]:
    """What ended the generation, as fields of a GenerateComplete."""
    stop = finished.matched_stop
    if stop is None:
        return {}
    return {"matched_stop_str": stop} if isinstance(stop, str) else {"matched_token_id": stop}
