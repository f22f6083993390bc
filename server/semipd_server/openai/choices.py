"""The generations that an OpenAI request asks for: `n` for each prompt."""

from collections.abc import Sequence
from typing import Any

from semipd_server.choices import Choices, prepare, seeds_of
from semipd_server.gate import Engine
from semipd_server.limits import MAX_CHOICES
from semipd_server.openai.errors import bad_request
from semipd_server.openai.schema import Sampling
from semipd_server.openai.structured import form_of


async def choices(
    engine: Engine, prompts: Sequence[tuple[int, ...]], request: Sampling, **sampling: Any
) -> Choices:
    """`n` choices of each prompt, in OpenAI's order.

    Raises:
      ApiError: `n` or `logit_bias` is wrong.
      EngineError: what `choices.prepare` raises.
    """
    if not 1 <= request.n <= MAX_CHOICES:
        raise bad_request(f"n is {request.n}; allowed: 1 to {MAX_CHOICES}", "n")
    return await prepare(
        engine,
        prompts,
        {**_sampling(request), **sampling},
        seeds_of(request.seed, request.n),
        priority=request.priority,
        cache_salt=request.cache_salt or "",
    )


def _sampling(request: Sampling) -> dict[str, Any]:
    stop = (request.stop,) if isinstance(request.stop, str) else request.stop
    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": 0 if request.top_k == -1 else request.top_k,  # -1 is vLLM's "all"
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "min_tokens": request.min_tokens,
        "stop": stop,
        "include_stop": request.include_stop_str_in_output,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": request.ignore_eos,
        "logit_bias": _logit_bias(request.logit_bias),
        "skip_special_tokens": request.skip_special_tokens,
        "structured_outputs": form_of(request),
    }


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    try:
        return {int(token_id): bias for token_id, bias in given.items()}
    except ValueError as error:
        raise bad_request(
            f"logit_bias has a key that is no token id ({error}); allowed: token ids as strings",
            "logit_bias",
        ) from error
