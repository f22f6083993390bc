"""What OpenAI's client can ask of a server. Runs in an environment that has only `openai`.

    python openai_client.py BASE_URL MODEL {all,gateway}

`gateway` leaves out what gateways answer in their own way. Prints the names of the checks.
"""

import asyncio
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

_PROMPT = "def main():"
_CHAT: Any = [{"role": "user", "content": "Say something."}]


def models(client: OpenAI, model: str) -> None:
    assert [m.id for m in client.models.list()] == [model]


def completion(client: OpenAI, model: str) -> None:
    found = client.completions.create(model=model, prompt=_PROMPT, max_tokens=8, temperature=0)
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage is not None
    assert 1 <= found.usage.completion_tokens <= 8


def completion_stream(client: OpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": _PROMPT, "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole


def chat(client: OpenAI, model: str) -> None:
    found = client.chat.completions.create(
        model=model, messages=_CHAT, max_completion_tokens=8, temperature=0
    )
    assert found.choices[0].message.role == "assistant"
    assert found.usage is not None
    assert found.usage.completion_tokens <= 8


def chat_stream_with_usage(client: OpenAI, model: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model=model, messages=_CHAT, max_completion_tokens=8, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert any(chunk.choices and chunk.choices[0].finish_reason for chunk in chunks)
    assert chunks[-1].usage is not None


def unknown_model(client: OpenAI, model: str) -> None:
    try:
        client.completions.create(model="absent", prompt=_PROMPT, max_tokens=1)
    except openai.NotFoundError:
        return
    raise AssertionError("an unknown model is served")


def asynchronous(client: OpenAI, model: str) -> None:
    async def work() -> None:
        async with AsyncOpenAI(base_url=str(client.base_url), api_key="x") as other:
            create = other.completions.create
            many = (create(model=model, prompt=_PROMPT, max_tokens=4) for _ in range(4))
            assert len(await asyncio.gather(*many)) == 4
            stream = await create(model=model, prompt=_PROMPT, max_tokens=400, stream=True)
            await anext(aiter(stream))
            await stream.close()

    asyncio.run(work())


def choices(client: OpenAI, model: str) -> None:
    found = client.completions.create(model=model, prompt=[_PROMPT, "x"], n=2, max_tokens=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]


def logprobs(client: OpenAI, model: str) -> None:
    found = client.completions.create(model=model, prompt=_PROMPT, logprobs=2, max_tokens=3)
    shown = found.choices[0].logprobs
    assert shown is not None
    assert shown.token_logprobs is not None
    assert all(value is not None and value <= 0 for value in shown.token_logprobs)
    talk = client.chat.completions.create(
        model=model, messages=_CHAT, logprobs=True, top_logprobs=2, max_completion_tokens=3
    )
    details = talk.choices[0].logprobs
    assert details is not None
    assert details.content is not None
    assert all(len(token.top_logprobs) == 2 for token in details.content)


def seeds(client: OpenAI, model: str) -> None:
    def text() -> str:
        found = client.completions.create(
            model=model, prompt=_PROMPT, seed=7, temperature=1, max_tokens=8
        )
        return found.choices[0].text

    assert text() == text()


def stop(client: OpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": _PROMPT, "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    cut = client.completions.create(**options, stop=[whole[1:3]]).choices[0]
    assert cut.finish_reason == "stop"
    assert whole[1:3] not in cut.text


def penalties_and_bias(client: OpenAI, model: str) -> None:
    client.completions.create(
        model=model, prompt=_PROMPT, max_tokens=4, presence_penalty=1, frequency_penalty=1,
        top_p=0.9, temperature=0.5, logit_bias={"5": -100},
    )  # fmt: skip


def echo(client: OpenAI, model: str) -> None:
    found = client.completions.create(model=model, prompt=_PROMPT, echo=True, max_tokens=2)
    assert found.choices[0].text.startswith(_PROMPT)


def token_ids(client: OpenAI, model: str) -> None:
    options: Any = {"model": model, "max_tokens": 4, "temperature": 0}
    lists: Any = [[5, 6, 7], [5, 6, 7]]
    found = client.completions.create(**options, prompt=lists)
    assert found.choices[0].text == found.choices[1].text
    assert found.usage is not None
    assert found.usage.prompt_tokens == 6


def streamed_logprobs(client: OpenAI, model: str) -> None:
    options: Any = {"model": model, "temperature": 0, "max_tokens": 4, "stream": True}
    count = 0
    for chunk in client.completions.create(**options, prompt=_PROMPT, logprobs=1):
        shown = chunk.choices[0].logprobs
        count += len(shown.tokens or ()) if shown else 0
    assert 1 <= count <= 4
    talk = client.chat.completions.create(
        **options, messages=_CHAT, logprobs=True, top_logprobs=2
    )  # fmt: skip
    parts = [chunk.choices[0].logprobs for chunk in talk if chunk.choices]
    tokens = [token for part in parts if part for token in part.content or ()]
    assert 1 <= len(tokens) <= 4
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def chat_choices_stop_and_seed(client: OpenAI, model: str) -> None:
    create = client.chat.completions.create
    options: Any = {"model": model, "messages": _CHAT, "max_completion_tokens": 16}
    first, second = (create(**options, n=3, seed=7, temperature=1) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    texts = [[choice.message.content for choice in found.choices] for found in (first, second)]
    assert texts[0] == texts[1]
    whole = create(**options, temperature=0).choices[0].message.content or ""
    cut = create(**options, temperature=0, stop=whole[1:3]).choices[0]
    assert cut.finish_reason == "stop"
    assert whole[1:3] not in (cut.message.content or "")


def chat_penalties_and_names(client: OpenAI, model: str) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "ada", "content": [{"type": "text", "text": "Hi."}]},
        {"role": "assistant", "content": "Hello.", "refusal": None},
        {"role": "user", "content": "Go on."},
    ]
    client.chat.completions.create(
        model=model, messages=messages, max_tokens=4, presence_penalty=1, frequency_penalty=1,
        top_p=0.9, temperature=0.5, logit_bias={"5": -100}, user="x", metadata={"a": "b"},
    )  # fmt: skip


def chat_asynchronous(client: OpenAI, model: str) -> None:
    async def work() -> None:
        async with AsyncOpenAI(base_url=str(client.base_url), api_key="x") as other:
            create = other.chat.completions.create
            options: Any = {"model": model, "messages": _CHAT, "temperature": 0}
            options["max_completion_tokens"] = 8
            wholes = await asyncio.gather(*(create(**options) for _ in range(4)))
            stream = await create(**options, stream=True)
            pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            assert {whole.choices[0].message.content for whole in wholes} == {"".join(pieces)}

    asyncio.run(work())


class _Answer(BaseModel):
    is_late: bool


def response_formats(client: OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": _CHAT, "max_completion_tokens": 100}
    parsed = client.chat.completions.parse(**options, response_format=_Answer).choices[0]
    assert parsed.finish_reason == "stop"
    assert isinstance(parsed.message.parsed, _Answer)
    found = client.chat.completions.create(
        **options, response_format={"type": "json_object"}, temperature=0
    ).choices[0]
    text = found.message.content or ""
    assert text.lstrip().startswith("{")
    assert found.finish_reason == "length" or isinstance(json.loads(text), dict)
    free = client.chat.completions.create(**options, response_format={"type": "text"})
    assert free.choices


def structured_outputs(client: OpenAI, model: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    forms: tuple[tuple[dict[str, Any], str], ...] = (
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"structured_outputs": {"json": schema}}, r'\s*\{\s*"a"\s*:\s*[12]\s*\}\s*'),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_json": schema}, r'\s*\{\s*"a"\s*:\s*[12]\s*\}\s*'),
    )
    for body, pattern in forms:
        options: Any = {"model": model, "max_tokens": 100, "extra_body": body}
        text = client.completions.create(**options, prompt=_PROMPT).choices[0].text
        assert re.fullmatch(pattern, text), (body, text)
        talk = client.chat.completions.create(**options, messages=_CHAT).choices[0]
        assert re.fullmatch(pattern, talk.message.content or ""), (body, talk)


def vllm_fields(client: OpenAI, model: str) -> None:
    extra: dict[str, Any] = {
        "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 4, "ignore_eos": True,
        "skip_special_tokens": False, "priority": 1, "cache_salt": "x",
    }  # fmt: skip
    options: Any = {"model": model, "max_tokens": 8}
    full = client.completions.create(**options, prompt=_PROMPT, extra_body=extra)
    assert full.usage is not None
    assert full.usage.completion_tokens == 8
    talk = client.chat.completions.create(**options, messages=_CHAT, extra_body=extra)
    assert talk.usage is not None
    assert talk.usage.completion_tokens == 8
    only = {"temperature": 0, "logit_bias": {"35": 100}, **options}
    end = client.completions.create(
        **only, prompt=_PROMPT, extra_body={"stop_token_ids": [35]}
    )  # fmt: skip
    choice: Any = end.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", 35)
    whole = client.completions.create(**options, prompt=_PROMPT, temperature=0).choices[0].text
    kept = client.completions.create(
        **options, prompt=_PROMPT, temperature=0, stop=whole[1:3],
        extra_body={"include_stop_str_in_output": True},
    )  # fmt: skip
    assert kept.choices[0].text == whole[:3]


def usage_in_every_chunk(client: OpenAI, model: str) -> None:
    asked: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = client.completions.create(
        model=model, prompt=_PROMPT, max_tokens=4, stream=True, stream_options=asked
    )
    assert all(chunk.usage is not None for chunk in chunks)


def errors(client: OpenAI, model: str) -> None:
    long: Any = [{"role": "user", "content": "x " * 100_000}]
    for fields, param, code in (
        ({"messages": long}, "messages", "context_length_exceeded"),
        ({"top_logprobs": 99, "logprobs": True}, "top_logprobs", None),
        ({"max_completion_tokens": 0}, "max_completion_tokens", None),
        ({"extra_body": {"no_such": 1}}, "no_such", "unknown_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", None),
    ):
        asked: Any = {"model": model, "messages": _CHAT, **fields}
        refused = _refusal(lambda asked=asked: client.chat.completions.create(**asked))
        assert refused.param == param, refused
        assert code is None or refused.code == code, refused


def bad_value(client: OpenAI, model: str) -> None:
    create = client.completions.create
    refused = _refusal(lambda: create(model=model, prompt=_PROMPT, temperature=-1))
    assert refused.param == "temperature"


def _refusal(work: Callable[[], object]) -> openai.BadRequestError:
    try:
        work()
    except openai.BadRequestError as error:
        return error
    raise AssertionError("it is taken")


_GATEWAY: tuple[Callable[[OpenAI, str], None], ...] = (
    *(models, completion, completion_stream, chat, chat_stream_with_usage, unknown_model),
    asynchronous,
)
_ALL: tuple[Callable[[OpenAI, str], None], ...] = (
    *(*_GATEWAY, choices, logprobs, seeds, stop, penalties_and_bias, bad_value, echo, token_ids),
    *(streamed_logprobs, chat_choices_stop_and_seed, chat_penalties_and_names, chat_asynchronous),
    *(response_formats, structured_outputs, vllm_fields, usage_in_every_chunk, errors),
)


def main() -> None:
    url, model, which = sys.argv[1:]
    with OpenAI(base_url=url, api_key="x", max_retries=0, timeout=60) as client:
        for check in _ALL if which == "all" else _GATEWAY:
            check(client, model)
            print(check.__name__, flush=True)


if __name__ == "__main__":
    main()
