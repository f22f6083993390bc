"""Bodies of requests and responses: OpenAI's fields, and those of vLLM's that we honour.

Fields that change nothing here are dropped (`IGNORED`). Fields that would change the answer, and
that we do not have, are refused unless they say what happens anyway (`INERT`); so is any other.
"""

from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from semipd_server.openai.errors import ApiError, bad_request

_UNKNOWN: Final = "Object contains unknown field `"
_MAX_PATH_CHARS: Final = 120

IGNORED: Final = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
        *("request_id", "spaces_between_special_tokens"),
    }
)
INERT: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
"""Field that is not supported → values beside null that mean what happens anyway."""


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of any request."""

    model: str = ""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampling(Body, kw_only=True):
    """What both kinds of completion take. Absent fields are the model's defaults."""

    n: int = 1
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int = 0
    cache_salt: str | None = None
    # at most one of these: see `structured`
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None


class CompletionRequest(Sampling, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True


class ContentPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of type "text". Other types are refused, and what they carry with them."""

    type: str
    text: str | None = None
    refusal: Any = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`name` is for templates that show it. The fields after it are of answers that this server
    does not give: they may come back empty, as clients send them."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None


class ChatRequest(Sampling, kw_only=True):
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class TokenizeRequest(Body, kw_only=True):
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body, kw_only=True):
    tokens: list[int]


def parse[T: Body](body: bytes, kind: type[T], *, max_brackets: int) -> T:
    """The request in a body of JSON.

    Args:
      max_brackets: that open arrays or objects, or are part of a text. Some millions of empty
        arrays fit into a body, and would stop everything for tenths of a second.

    Raises:
      ApiError: 400, naming the field, its value and what is allowed.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > max_brackets:
        raise bad_request(f"the body has {brackets} opening brackets; allowed: {max_brackets}")
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise bad_request(f"the body is a JSON {_kind_of(given)}; allowed: an object")
    known = {field.name for field in msgspec.structs.fields(kind)}
    fields = {name: given[name] for name in given if given[name] is not None}
    for name in fields.keys() - known:
        _check_unknown(name, fields[name])
    try:
        return msgspec.convert({n: fields[n] for n in fields.keys() & known}, kind)
    except msgspec.ValidationError as error:
        raise _type_error(str(error), fields) from error


def _check_unknown(name: str, value: Any) -> None:
    if name in IGNORED:
        return
    if name not in INERT:
        raise bad_request(f"unrecognized field {name!r:.80}", name[:80], "unknown_parameter")
    if value not in INERT[name]:
        allowed = " or ".join(["null", *(msgspec.json.encode(v).decode() for v in INERT[name])])
        raise bad_request(
            f"{name} is {value!r:.80}, which is not supported; allowed: {allowed}",
            name,
            "unsupported_parameter",
        )


def _type_error(text: str, fields: dict[str, Any]) -> ApiError:
    """From a message such as "Expected `int`, got `str` - at `$.stop[0]`"."""
    problem, _, path = text.partition(" - at `$.")
    path = path.removesuffix("`")
    if problem.startswith(_UNKNOWN):
        path = f"{path}.{problem.removeprefix(_UNKNOWN).removesuffix('`')}"[:_MAX_PATH_CHARS]
        return bad_request(f"unrecognized field {path!r}", path, "unknown_parameter")
    name = path.replace(".", "[").partition("[")[0]
    if name in fields:
        return bad_request(f"{path} is wrong in {fields[name]!r:.80}: {problem}", path)
    missing = problem.removeprefix("Object missing required field `").removesuffix("`")
    return bad_request(f"{problem}", missing if missing != problem else path or None)


def _kind_of(value: object) -> str:
    return "array" if isinstance(value, list) else type(value).__name__


# ---------------------------------------------------------------- responses


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """Whole, or a chunk of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatDelta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Completion(msgspec.Struct):
    """A whole answer or a chunk of one, of either kind. `usage` is null in all but the last chunk
    of a stream that was asked for it, and absent where it was not."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None


class Model(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "semipd"


class ModelList(msgspec.Struct):
    data: list[Model]
    object: str = "list"


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    prompt: str
