"""Structured outputs on the demo model: the text has its form, and nobody else notices."""

import asyncio
import json
import re
from contextlib import ExitStack
from typing import Any

import jsonschema
import openai
import pytest
from e2e_processes import kill
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field
from serve_rig import serving

from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import AsyncEngine
from semipd_jax.errors import InvalidRequestError
from semipd_jax.request import FinishReason
from semipd_server.client import Client

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "lines": {"type": "integer", "minimum": 1, "maximum": 9999},
        "kind": {"enum": ["function", "class"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        "parent": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "lines", "kind", "tags", "parent"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"line": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["line"],
            "additionalProperties": False,
        }
    },
}
REGEX = r"[a-z_]{3,12}\(([0-9]{1,3}(, [0-9]{1,3}){0,4})?\)"
CHOICE = ["import os", "import sys", "return None"]
POOL_BYTES = 2 << 20
"""Less than eight requests that run at once want: see test_load."""


def check(form: dict[str, Any] | None, text: str) -> None:
    match form:
        case {"json": schema}:
            jsonschema.validate(json.loads(text), schema)
        case {"regex": regex}:
            assert re.fullmatch(regex, text)
        case {"choice": texts}:
            assert text in texts


def requests() -> list[dict[str, Any]]:
    forms = [{"json": SCHEMA}, {"regex": REGEX}, {"choice": CHOICE}, None, None]
    return [
        {
            "prompt": f"# {i}\n" + "def read(self, path):\n    return self.file\n" * (1 + i % 5),
            "structured_outputs": forms[i % 5],
            "temperature": 0.0 if i % 4 == 0 else 1.2,
            "seed": i,
            "max_tokens": 100 if forms[i % 5] is None else 150,
            "ignore_eos": forms[i % 5] is None,
            "logprobs": 0 if i % 3 == 0 else None,
            "top_p": 0.9 if i % 7 == 0 else 1.0,
        }
        for i in range(25)
    ]


async def generate(engine: AsyncEngine, request: dict[str, Any]) -> tuple[int, ...]:
    """The tokens, and what they spell is checked."""
    form = request["structured_outputs"]
    result = await engine.complete(**request)
    if form is not None and result.reason is FinishReason.STOP:
        check(form, result.text)
    assert form is None or result.reason is FinishReason.STOP, result.text
    assert len(result.logprobs) == (0 if request["logprobs"] is None else len(result.token_ids))
    assert all(entry.logprob <= 0 for entry in result.logprobs)
    return result.token_ids


def test_forms_hold_among_others_through_preemption_and_the_loss_of_workers(compile_cache):
    async def kill_workers(running: asyncio.Future) -> int:
        num_kills = 0
        for phase in ("decode", "prefill", "decode"):
            await asyncio.sleep(0.1)
            if not running.done():
                num_kills += kill(f"{phase} worker 1.00")
        return num_kills

    async def run() -> None:
        async with AsyncEngine(
            str(MODEL_DIR),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=256,
            kv_cache_memory_bytes=POOL_BYTES,
            compile_cache_dir=compile_cache,
        ) as engine:
            alone = [await generate(engine, request) for request in requests()]
            running = asyncio.gather(*(generate(engine, request) for request in requests()))
            assert await running == alone
            assert (await engine.stats()).num_preemptions > 0
            running = asyncio.gather(*(generate(engine, request) for request in requests()))
            assert await kill_workers(running) > 0
            assert await asyncio.wait_for(running, 240) == alone
            stats = await engine.stats()
            assert stats.num_compiles == 0
            assert stats.num_free_pages == stats.num_pages

    asyncio.run(run())


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    line: int = Field(ge=0, le=99)
    kind: bool


def test_clients_get_their_forms_and_refusals_that_name_the_field(tmp_path, compile_cache):
    """OpenAI's client over HTTP, ours over gRPC."""
    options = ["--http-port=0", "--compile-cache-dir", compile_cache]
    with ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path / "log", *options))
        target = server.wait_for(r"is served at (\S+) after")[1]
        url = server.wait_for(r"OpenAI API: (\S+)/v1")[1]
        client = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
        ours = stack.enter_context(Client(target))
        model = client.models.list().data[0].id
        check_chat(client, model)
        check_completions(client, model)
        text = ours.complete("x = ", structured_outputs={"regex": "[0-9]{2}"}, temperature=1.0)
        assert re.fullmatch("[0-9]{2}", text)
        with pytest.raises(InvalidRequestError, match="unclosed") as refused:
            ours.complete("x = ", structured_outputs={"regex": "(a"})
        assert refused.value.field == "sampling.structured_outputs.regex"


def check_chat(client: OpenAI, model: str) -> None:
    chat = {"model": model, "messages": [{"role": "user", "content": "where?"}], "seed": 3}
    parsed = client.chat.completions.parse(**chat, response_format=Place, n=2).choices
    assert all(isinstance(choice.message.parsed, Place) for choice in parsed)
    named = {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA}}
    stream = client.chat.completions.create(**chat, response_format=named, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    check({"json": SCHEMA}, text)
    whole = client.chat.completions.create(
        **chat, response_format={"type": "json_object"}, max_tokens=30, temperature=0
    ).choices[0]
    assert whole.message.content.startswith("{")
    assert whole.finish_reason == "length" or json.loads(whole.message.content) is not None
    for wrong, word in (({"not": {}}, "not"), ({"type": "text"}, "text")):
        bad = {"type": "json_schema", "json_schema": {"name": "f", "schema": wrong}}
        with pytest.raises(openai.BadRequestError, match=word) as refused:
            client.chat.completions.create(**chat, response_format=bad)
        assert refused.value.param == "response_format"


def check_completions(client: OpenAI, model: str) -> None:
    for extra, form in (
        ({"structured_outputs": {"choice": CHOICE}}, {"choice": CHOICE}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"guided_regex": REGEX}, {"regex": REGEX}),
        ({"guided_choice": CHOICE}, {"choice": CHOICE}),
    ):
        reply = client.completions.create(
            model=model, prompt="def ", max_tokens=200, seed=1, extra_body=extra
        ).choices[0]
        assert reply.finish_reason == "stop"
        check(form, reply.text)
    with pytest.raises(openai.BadRequestError, match="look-around") as refused:
        client.completions.create(model=model, prompt="def ", extra_body={"guided_regex": "a(?=b)"})
    assert refused.value.param == "guided_regex"
