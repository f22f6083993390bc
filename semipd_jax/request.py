"""A request and what comes back for it, as engine and library users see them."""

import enum
import json
from dataclasses import dataclass
from typing import Final

from semipd_jax.errors import InvalidRequestError

MAX_LOGPROBS: Final = 20
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_CHARS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 64
MAX_LOGIT_BIAS: Final = 300
ANY_OBJECT: Final = '{"type": "object"}'
"""The schema that every JSON object has."""
MAX_SCHEMA_CHARS: Final = 65536
MAX_REGEX_CHARS: Final = 4096
"""Also of a pattern in a schema: compiling one may take time quadratic in its length."""
MAX_SCHEMA_DEPTH: Final = 64
MAX_CHOICE_TEXTS: Final = 1024
MAX_REQUEST_ID_CHARS: Final = 128
MAX_CACHE_SALT_CHARS: Final = 256
MAX_PRIORITY: Final = 2**31 - 1


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the model's length limit
    ABORT = "abort"  # the client or the server asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """The form that the generated text must have: one of these, by vLLM's names.

    Attributes:
      json: text of a JSON schema (2020-12); the output is a document that it accepts.
      regex: a regular expression, in the syntax of Rust's regex, that all of the text matches.
      choice: the text is one of these.
    """

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. Defaults are OpenAI's and vLLM's.

    Attributes:
      max_tokens: most tokens to generate; None means up to the model's length limit.
      min_tokens: end-of-sequence and stop tokens are not sampled, and stop strings not looked for,
        before this many tokens.
      temperature: 0 is greedy.
      top_p: keep the smallest set of tokens whose probability reaches this (1 keeps all).
      top_k: keep this many tokens (0 keeps all).
      min_p: drop tokens less probable than this times the most probable one (0 keeps all).
      presence_penalty, frequency_penalty: OpenAI's, over generated tokens.
      repetition_penalty: Hugging Face's, over prompt and generated tokens (1 is none).
      seed: same seed and prompt give the same tokens, whatever else runs; None: engine's choice.
      stop: strings that end generation; not part of the text unless `include_stop`.
      stop_token_ids: tokens that end generation, beside the model's own.
      ignore_eos: do not end at the model's end-of-sequence tokens.
      logit_bias: added to the logits of these token ids.
      logprobs: number of most likely tokens to report per position; 0 reports just the sampled
        one; None reports nothing.
      skip_special_tokens: leave special tokens out of the text.
      structured_outputs: only tokens that lead to this form are sampled, and the output ends when
        it cannot go on. None leaves it free.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation, tokenised. Created by `client.EngineClient` after validation.

    Attributes:
      priority: class of the request; lower ones are prefilled first and preempted last.
      cache_salt: KV is reused only among requests with the same salt, one per tenant for instance:
        from its latency nobody learns what others' prompts begin with.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a sampled token, and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of a request's life, from the coordinator's clock."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted: its prefill begins."""

    prompt_tokens: int
    cached_tokens: int = 0
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens since the last event. `text` may lag behind `token_ids` by an incomplete character
    or by a possible beginning of a stop string."""

    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every request that was not refused.

    Attributes:
      matched_stop: the stop string or the stop token id that ended it.
    """

    reason: FinishReason
    usage: Usage
    matched_stop: str | int | None = None
    timings: Timings = Timings()


type Event = Started | Delta | Finished


def validate_sampling(params: SamplingParams, *, vocab_size: int) -> None:
    """Raises InvalidRequestError that names the field, the value and what is allowed."""
    p = params
    validate_lengths(p)
    _validate_choice(p)
    _validate_stops(p, vocab_size)
    few = len(p.logit_bias) <= MAX_LOGIT_BIAS
    _require(few, "logit_bias", len(p.logit_bias), f"at most {MAX_LOGIT_BIAS} entries")
    for token, bias in p.logit_bias:
        _require(0 <= token < vocab_size, "logit_bias", token, f"token ids 0 to {vocab_size - 1}")
        _require(-100.0 <= bias <= 100.0, "logit_bias", bias, "values -100 to 100")
    is_allowed = p.logprobs is None or 0 <= p.logprobs <= MAX_LOGPROBS
    _require(is_allowed, "logprobs", p.logprobs, f"0 to {MAX_LOGPROBS}, or unset")
    if p.structured_outputs is not None:
        _validate_form(p.structured_outputs)


def validate_lengths(params: SamplingParams) -> None:
    """Of the output; the part of `validate_sampling` that depends on the prompt's length."""
    p = params
    _require(
        p.max_tokens is None or 1 <= p.max_tokens <= 2**31 - 1,
        "max_tokens",
        p.max_tokens,
        "at least 1, or unset",
    )
    most = p.max_tokens if p.max_tokens is not None else 2**31 - 1
    _require(0 <= p.min_tokens <= most, "min_tokens", p.min_tokens, "0 to max_tokens")


def _validate_choice(p: SamplingParams) -> None:
    """Of tokens: temperature, truncation, penalties, seed."""
    _require(0.0 <= p.temperature <= 100.0, "temperature", p.temperature, "0 to 100")
    _require(0.0 < p.top_p <= 1.0, "top_p", p.top_p, "above 0 and at most 1")
    _require(0 <= p.top_k <= 2**31 - 1, "top_k", p.top_k, "0 (off) or more")
    _require(0.0 <= p.min_p <= 1.0, "min_p", p.min_p, "0 to 1")
    for field in ("presence_penalty", "frequency_penalty"):
        value = getattr(p, field)
        _require(-2.0 <= value <= 2.0, field, value, "-2 to 2")
    _require(
        0.0 < p.repetition_penalty <= 100.0,
        "repetition_penalty",
        p.repetition_penalty,
        "above 0 and at most 100",
    )
    _require(p.seed is None or 0 <= p.seed < 2**64, "seed", p.seed, "0 to 2**64 - 1, or unset")


def _validate_stops(p: SamplingParams, vocab_size: int) -> None:
    few = len(p.stop) <= MAX_STOP_STRINGS
    _require(few, "stop", len(p.stop), f"at most {MAX_STOP_STRINGS} strings")
    for text in p.stop:
        _require(
            1 <= len(text) <= MAX_STOP_STRING_CHARS,
            "stop",
            text[:40],
            f"strings of 1 to {MAX_STOP_STRING_CHARS} characters",
        )
    few = len(p.stop_token_ids) <= MAX_STOP_TOKEN_IDS
    _require(few, "stop_token_ids", len(p.stop_token_ids), f"at most {MAX_STOP_TOKEN_IDS} ids")
    for token in p.stop_token_ids:
        _require(0 <= token < vocab_size, "stop_token_ids", token, f"0 to {vocab_size - 1}")


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:  # NaN fails every comparison, so it is refused too
        raise InvalidRequestError(f"{field} is {value!r}; allowed: {allowed}", field=field)


def _validate_form(form: StructuredOutputs) -> None:
    """Bounds what is compiled later; whether it can be is found out there."""

    def require(ok: bool, field: str, value: object, allowed: str) -> None:
        if not ok:
            field = f"structured_outputs{field and '.'}{field}"
            raise InvalidRequestError(f"{field} is {value}; allowed: {allowed}", field=field)

    given = [name for name in ("json", "regex", "choice") if getattr(form, name)]
    names = " and ".join(given) or "empty"
    require(len(given) == 1, "", names, "one of json, regex and choice")
    for field, most in (("json", MAX_SCHEMA_CHARS), ("regex", MAX_REGEX_CHARS)):
        size = len(getattr(form, field) or "")
        require(size <= most, field, f"{size} characters long", f"at most {most}")
    size = sum(map(len, form.choice))
    allowed = f"at most {MAX_CHOICE_TEXTS} texts of {MAX_SCHEMA_CHARS} characters in all"
    is_small = len(form.choice) <= MAX_CHOICE_TEXTS and size <= MAX_SCHEMA_CHARS
    require(is_small, "choice", f"{len(form.choice)} texts of {size} characters", allowed)
    require(all(form.choice), "choice", "a list with an empty text", "texts of some length")
    for text in (form.json, form.regex, *form.choice):
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            require(False, given[0], f"not Unicode ({error})", "text")
    if form.json is not None:
        try:
            schema = json.loads(form.json)
        except (ValueError, RecursionError) as error:
            require(False, "json", f"not JSON ({error})", "the text of a JSON schema")
        else:
            require(isinstance(schema, dict), "json", f"{form.json[:40]!r}", "an object")
            depth, longest = _measure(schema)
            allowed = f"at most {MAX_SCHEMA_DEPTH}"
            require(depth <= MAX_SCHEMA_DEPTH, "json", f"{depth} levels deep", allowed)
            allowed = f"at most {MAX_REGEX_CHARS}"
            value = f"one with a pattern of {longest} characters"
            require(longest <= MAX_REGEX_CHARS, "json", value, allowed)


def _measure(schema: object) -> tuple[int, int]:
    """Levels of objects and arrays in each other; characters of the longest name or pattern."""
    depth = longest = 0
    level = [schema]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        children: list[object] = []
        for value in level:
            if isinstance(value, dict):
                pattern = value.get("pattern")
                texts = [*value, pattern] if isinstance(pattern, str) else [*value]
                longest = max(longest, *map(len, texts), 0)
            children += value.values() if isinstance(value, dict) else value
        level = children
    return depth, longest


def validate_scheduling(*, priority: object, cache_salt: object) -> None:
    """Raises InvalidRequestError if a field is of another type or out of range."""
    if type(priority) is not int or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority is {priority!r}; allowed: an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}",
            field="priority",
        )
    if (
        not isinstance(cache_salt, str)
        or len(cache_salt) > MAX_CACHE_SALT_CHARS
        or not cache_salt.isprintable()
    ):
        raise InvalidRequestError(
            f"cache_salt is {cache_salt!r:.40}; allowed: at most {MAX_CACHE_SALT_CHARS} printable "
            "characters",
            field="cache_salt",
        )


def validate_prompt(
    token_ids: tuple[int, ...], *, max_tokens: int | None, vocab_size: int, max_model_len: int
) -> None:
    """Raises InvalidRequestError if the prompt is empty, too long, or has an id out of range."""
    if not token_ids:
        raise InvalidRequestError(
            "the prompt is empty; it needs at least one token", field="prompt"
        )
    if len(token_ids) >= max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(token_ids)} tokens; allowed: at most {max_model_len - 1}, so "
            f"that one more fits into the model length of {max_model_len}",
            field="prompt",
            is_too_long=True,
        )
    if max_tokens is not None and len(token_ids) + max_tokens > max_model_len:
        raise InvalidRequestError(
            f"max_tokens is {max_tokens}; allowed: at most {max_model_len - len(token_ids)} after "
            f"a prompt of {len(token_ids)} tokens (model length {max_model_len})",
            field="max_tokens",
            is_too_long=True,
        )
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise InvalidRequestError(
            f"token id {bad} is out of range; allowed: 0 to {vocab_size - 1}", field="prompt"
        )
