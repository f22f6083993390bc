"""Models, tokenising, health."""

import asyncio
from dataclasses import replace

import pytest
from openai_rig import openai_client, request
from server_rig import MAX_MODEL_LEN, Start

from semipd_jax.text.tokenizer import Tokenizer
from semipd_server.front_end import FrontEnd
from semipd_server.settings import Settings

CHAT = [{"role": "user", "content": "Grüße"}]


def test_models(start: Start):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            models = [model async for model in client.models.list()]
            assert [model.id for model in models] == ["tiny"]
            assert models[0].object == "model"
            assert models[0].max_model_len == MAX_MODEL_LEN
            assert await client.models.retrieve("tiny") == models[0]

    asyncio.run(main())


def test_tokenize_and_back(start: Start, tokenizer: Tokenizer):
    async def main():
        async with start() as rig:
            ids = tokenizer.encode("Grüße")
            reply = (await request(rig, "POST", "/tokenize", json={"prompt": "Grüße"})).json()
            assert reply["tokens"] == ids
            assert (reply["count"], reply["max_model_len"]) == (len(ids), MAX_MODEL_LEN)
            body = {"prompt": "Grüße", "add_special_tokens": False, "return_token_strs": True}
            bare = (await request(rig, "POST", "/tokenize", json=body)).json()
            assert bare["tokens"] == ids[1:]
            assert len(bare["token_strs"]) == len(ids) - 1
            chat = (await request(rig, "POST", "/tokenize", json={"messages": CHAT})).json()
            assert chat["tokens"] == tokenizer.encode_chat(CHAT)
            back = await request(rig, "POST", "/detokenize", json={"tokens": ids})
            assert back.json() == {"prompt": "<|bos|>Grüße"}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": "x" * 2000}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["x"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [5] * (MAX_MODEL_LEN + 1)}, "tokens"),
    ],
)
def test_bad_fields_are_named(start: Start, path: str, body: dict, param: str):
    async def main():
        async with start() as rig:
            reply = await request(rig, "POST", path, json=body)
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == param

    asyncio.run(main())


def test_version(start: Start):
    async def main():
        async with start() as rig:
            reply = await request(rig, "GET", "/version")
            assert reply.json()["version"]

    asyncio.run(main())


# ---------------------------------------------------------------- health


def test_health_says_why_not(start: Start):
    async def main():
        async with start() as rig:
            assert (await request(rig, "GET", "/health")).status_code == 200
            await rig.front_end.set_waiting_for(("decode worker 1.00: compile 3/9",))
            reply = await request(rig, "GET", "/health")
            assert reply.status_code == 503
            assert "decode worker 1.00: compile 3/9" in reply.json()["reason"]
            await rig.front_end.set_waiting_for(())
            assert (await request(rig, "GET", "/health")).status_code == 200
            await rig.front_end.drain(0.1)
            reply = await request(rig, "GET", "/health")
            assert reply.status_code == 503
            assert "shutting down" in reply.json()["reason"]

    asyncio.run(main())


def test_health_of_a_coordinator_that_does_not_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("semipd_server.gate._STATS_TIMEOUT_S", 0.1)

    async def main():
        async with start() as rig:
            rig.fake.hub.send = lambda *_: True  # says nothing any more
            reply = await request(rig, "GET", "/health")
            assert reply.status_code == 503
            assert "does not answer" in reply.json()["reason"]

    asyncio.run(main())


def test_health_asks_the_coordinator_only_now_and_then(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    async def main():
        async with start() as rig:
            asked: list[int] = []
            answer = rig.fake._stats
            monkeypatch.setattr(rig.fake, "_stats", lambda i: asked.append(i) or answer(i))
            monkeypatch.setattr("semipd_server.gate._ASK_EVERY_S", 60.0)
            many = [request(rig, "GET", "/health") for _ in range(10)]
            replies = [await request(rig, "GET", "/health"), *await asyncio.gather(*many)]
            assert {reply.status_code for reply in replies} == {200}
            assert len(asked) == 1
            monkeypatch.setattr("semipd_server.gate._ASK_EVERY_S", 0.0)
            assert (await request(rig, "GET", "/health")).status_code == 200
            assert len(asked) == 2

    asyncio.run(main())


def test_health_before_there_is_an_engine(start: Start):
    async def main():
        starting = FrontEnd(Settings(port=0, http_port=0), max_model_len=64, max_calls=10)
        _, url = await starting.start()
        async with start() as rig:
            rig = replace(rig, url=url or "")
            assert "starting" in (await request(rig, "GET", "/health")).json()["reason"]
            await starting.set_waiting_for(("memory owner: load 3/10",))
            reply = await request(rig, "GET", "/health")
            assert reply.status_code == 503
            assert "memory owner: load 3/10" in reply.json()["reason"]
            assert (await request(rig, "GET", "/dashboard")).status_code == 200
            reply = await request(rig, "GET", "/v1/models")
            assert reply.status_code == 503
            assert "starting" in reply.json()["error"]["message"]
        await starting.stop()

    asyncio.run(main())


def test_draining_waits_for_running_requests(start: Start):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            create = client.completions.create(model="tiny", prompt=[5], max_tokens=9)
            running = asyncio.ensure_future(create)
            await rig.fake.until(lambda: bool(rig.fake.running), stepping=False)
            draining = asyncio.ensure_future(rig.front_end.drain(60))
            await asyncio.sleep(0)
            assert not draining.done()
            await rig.fake.until(running.done)
            answer = running.result()
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 9
            await asyncio.wait_for(draining, 60)

    asyncio.run(main())
