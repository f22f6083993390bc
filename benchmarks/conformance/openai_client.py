"""What OpenAI's client can ask of a server. Runs in an environment that has only `openai`.

    python openai_client.py BASE_URL MODEL {all,gateway}

`gateway` leaves out what gateways answer in their own way. Prints the names of the checks.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

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


def bad_value(client: OpenAI, model: str) -> None:
    named = None
    try:
        client.completions.create(model=model, prompt=_PROMPT, temperature=-1)
    except openai.BadRequestError as error:
        named = error.param
    assert named == "temperature"


_GATEWAY: tuple[Callable[[OpenAI, str], None], ...] = (
    *(models, completion, completion_stream, chat, chat_stream_with_usage, unknown_model),
    asynchronous,
)
_ALL = (*_GATEWAY, choices, logprobs, seeds, stop, penalties_and_bias, bad_value)


def main() -> None:
    url, model, which = sys.argv[1:]
    with OpenAI(base_url=url, api_key="x", max_retries=0, timeout=60) as client:
        for check in _ALL if which == "all" else _GATEWAY:
            check(client, model)
            print(check.__name__, flush=True)


if __name__ == "__main__":
    main()
