import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
from fake_coordinator import TIMINGS, FakeCoordinator, arithmetic, layout

from semipd_jax.client import EngineClient
from semipd_jax.client.line import CALLER
from semipd_jax.client.observations import ERROR, RequestTimes
from semipd_jax.client.stream import MAX_DELTA_TOKENS, Stream
from semipd_jax.client.turns import MAX_TURNS, Turns
from semipd_jax.config import ModelConfig
from semipd_jax.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    RequestNotFoundError,
    StartupError,
    UnavailableError,
)
from semipd_jax.messages import Done
from semipd_jax.request import (
    Delta,
    Event,
    Finished,
    FinishReason,
    SamplingParams,
    Started,
    TokenLogprob,
    Usage,
)
from semipd_jax.text.output import OutputText
from semipd_jax.text.tokenizer import Tokenizer

EOS = 1
PROMPT = [5, 6, 7]


class Rig:
    """A client, and the coordinator that it talks to."""

    def __init__(self, client: EngineClient, fake: FakeCoordinator) -> None:
        self.client = client
        self.fake = fake

    async def run(self, events: AsyncGenerator[Event]) -> list[Event]:
        """All events of one request, while the coordinator steps."""
        reader = asyncio.ensure_future(self.read(events))
        await self.fake.until(reader.done)
        return reader.result()

    async def read(self, events: AsyncGenerator[Event]) -> list[Event]:
        return [event async for event in events]

    async def started(self, events: AsyncGenerator[Event]) -> None:
        """Submits the request, and reads its first event."""
        first = asyncio.ensure_future(anext(events))
        await self.fake.until(first.done, stepping=False)
        assert isinstance(first.result(), Started)


@pytest.fixture
def rig(run_dir: str, tokenizer: Tokenizer):
    @asynccontextmanager
    async def start(defaults=None, seed: int = 0, **fields) -> AsyncIterator[Rig]:
        client = EngineClient(
            run_dir,
            layout(tokenizer.size, max_model_len=64, eos=(EOS,)),
            tokenizer,
            ModelConfig(path="model", seed=seed),
            defaults or {},
        )
        with FakeCoordinator(run_dir, **fields) as fake:
            await client.start()
            try:
                yield Rig(client, fake)
            finally:
                await client.close()

    return start


def tokens(events: list[Event]) -> list[int]:
    return [t for event in events if isinstance(event, Delta) for t in event.token_ids]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def says(tokenizer: Tokenizer, answer: str):
    """Coordinator's answer: this text, then the end-of-sequence token."""
    ids = [*tokenizer.encode(answer, add_special_tokens=False), EOS]
    return lambda _, position: ids[position]


def test_a_request_brings_started_tokens_and_finished(rig):
    async def main():
        async with rig() as r:
            events = await r.run(r.client.generate(PROMPT, {"max_tokens": 4}, request_id="one"))
            assert events[0] == Started(prompt_tokens=3, cached_tokens=0, queue_s=0.001)
            assert tokens(events) == [arithmetic(r.fake.submitted[0], i) for i in range(4)]
            assert events[-1] == Finished(
                FinishReason.LENGTH, Usage(prompt_tokens=3, completion_tokens=4), None, TIMINGS
            )
            assert r.fake.submitted[0].request_id == "one"
            assert r.fake.submitted[0].prompt_token_ids == (5, 6, 7)
            assert r.fake.aborted == []

    asyncio.run(main())


def test_many_streams_at_once_each_get_their_own_tokens(rig):
    async def main():
        async with rig() as r:
            streams = [r.client.generate([i, 2 * i], {"max_tokens": 9 + i}) for i in range(1, 33)]
            readers = asyncio.gather(*map(r.read, streams))
            await r.fake.until(readers.done)
            by_prompt = {request.prompt_token_ids: request for request in r.fake.submitted}
            for i, events in enumerate(readers.result(), start=1):
                request = by_prompt[i, 2 * i]
                assert tokens(events) == [arithmetic(request, k) for k in range(9 + i)]

    asyncio.run(main())


@pytest.mark.parametrize("answer", ["The quick 日本語 😀 fox", "", "<think>é</think>"])
def test_text_is_what_the_tokens_decode_to(rig, tokenizer: Tokenizer, answer: str):
    async def main():
        async with rig(answer=says(tokenizer, answer)) as r:
            events = await r.run(r.client.generate("Grüße", {}))
            assert text(events) == answer
            assert tokens(events)[-1] == EOS
            assert events[-1].reason == FinishReason.STOP
            assert events[-1].matched_stop == EOS
            assert r.fake.submitted[0].prompt_token_ids == tuple(tokenizer.encode("Grüße"))

    asyncio.run(main())


def test_what_is_submitted_is_complete(rig):
    async def submitted(seed: int, *samplings):
        async with rig(defaults={"temperature": 0.5}, seed=seed) as r:
            for sampling in samplings:
                r.fake.submitted.clear()
                events = r.client.generate(PROMPT, sampling)
                await r.started(events)
                await events.aclose()
                yield r.fake.submitted[0].sampling

    async def main():
        first, second, big, own, ignore, full = [
            s
            async for s in submitted(
                7,
                {},
                {},
                {"seed": 2**40 + 3},
                {"seed": 5, "stop_token_ids": [9]},
                {"ignore_eos": True, "stop_token_ids": [9]},
                SamplingParams(seed=1),
            )
        ]
        assert first.max_tokens == 64 - 3
        assert first.temperature == 0.5
        assert first.stop_token_ids == (EOS,)
        assert first.seed != second.seed
        assert 0 <= big.seed < 2**32
        assert (own.seed, own.stop_token_ids) == (5, (9, EOS))
        assert ignore.stop_token_ids == (9,)
        assert full.temperature == 1.0
        assert [s async for s in submitted(7, {}, {})] == [first, second]
        assert [s.seed async for s in submitted(8, {})] != [first.seed]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], {}, "prompt"),
        ([1] * 64, {}, "prompt"),
        ([10_000], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([{"role": "user"}], {}, "chat"),
        ([1], {"max_tokens": 64}, "max_tokens"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"no_such_field": 1}, "no_such_field"),
    ],
)
def test_what_can_never_run_is_refused_here(rig, prompt, sampling, field: str):
    async def main():
        async with rig() as r:
            with pytest.raises(InvalidRequestError) as error:
                await anext(r.client.generate(prompt, sampling))
            assert error.value.field == field
            r.fake.receive()
            assert r.fake.submitted == []

    asyncio.run(main())


@pytest.mark.parametrize("request_id", ["x" * 129, "new\nline", "snow☃"])
def test_request_ids_are_checked(rig, request_id: str):
    async def main():
        async with rig() as r:
            with pytest.raises(InvalidRequestError, match="printable") as error:
                await anext(r.client.generate(PROMPT, {}, request_id=request_id))
            assert error.value.field == "request_id"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 2**31),
        ("priority", 0.5),
        ("cache_salt", "x" * 257),
        ("cache_salt", "\ud800"),
        ("cache_salt", None),
    ],
)
def test_priority_and_salt_are_checked(rig, field: str, value: object):
    async def main():
        async with rig() as r:
            with pytest.raises(InvalidRequestError, match="allowed") as error:
                await anext(r.client.generate(PROMPT, {}, **{field: value}))
            assert error.value.field == field
            r.fake.receive()
            assert r.fake.submitted == []

    asyncio.run(main())


def test_priority_and_salt_reach_the_coordinator(rig):
    async def main():
        async with rig() as r:
            options = {"priority": -3, "cache_salt": "tenant"}
            await r.run(r.client.generate(PROMPT, {"max_tokens": 1}, **options))
            await r.run(r.client.generate(PROMPT, {"max_tokens": 1}))
            seen = [(request.priority, request.cache_salt) for request in r.fake.submitted]
            assert seen == [(-3, "tenant"), (0, "")]

    asyncio.run(main())


def test_an_id_can_be_used_again_only_when_its_request_is_over(rig):
    async def main():
        async with rig() as r:
            events = r.client.generate(PROMPT, {"max_tokens": 2}, request_id="same")
            await r.started(events)
            with pytest.raises(DuplicateRequestError, match="same"):
                await anext(r.client.generate(PROMPT, {}, request_id="same"))
            await r.run(events)
            again = r.client.generate(PROMPT, {"max_tokens": 2}, request_id="same")
            assert len(tokens(await r.run(again))) == 2

    asyncio.run(main())


def test_closing_the_generator_aborts_at_once(rig):
    async def main():
        async with rig() as r:
            events = r.client.generate(PROMPT, {}, request_id="gone")
            await r.started(events)
            await events.aclose()
            await r.fake.until(lambda: r.fake.aborted == [FinishReason.ABORT], stepping=False)
            assert r.fake.running == {}
            with pytest.raises(RequestNotFoundError):
                await r.client.abort("gone")

    asyncio.run(main())


def test_breaking_out_of_the_loop_aborts_at_once(rig):
    async def main():
        async with rig() as r:
            serving = asyncio.ensure_future(r.fake.serve())
            async for _ in r.client.generate(PROMPT, {}):
                break
            await r.fake.until(lambda: r.fake.aborted == [FinishReason.ABORT])
            serving.cancel()

    asyncio.run(main())


def test_cancelling_the_reader_aborts_at_once(rig):
    async def main():
        async with rig() as r:
            reader = asyncio.ensure_future(r.read(r.client.generate(PROMPT, {})))
            await r.fake.until(lambda: len(r.fake.running) == 1, stepping=False)
            reader.cancel()
            await r.fake.until(lambda: r.fake.aborted == [FinishReason.ABORT], stepping=False)

    asyncio.run(main())


def test_abort_by_id_ends_the_stream_with_its_reason(rig):
    async def main():
        async with rig() as r:
            events = r.client.generate(PROMPT, {}, request_id="stop me")
            await r.started(events)
            r.fake.step()
            await r.client.abort("stop me")
            rest = await r.run(events)
            assert rest[-1].reason == FinishReason.ABORT
            assert rest[-1].usage == Usage(3, len(tokens(rest)))
            with pytest.raises(RequestNotFoundError, match="stop me"):
                await r.client.abort("stop me")

    asyncio.run(main())


@pytest.mark.parametrize(("include", "expected"), [(False, "one two "), (True, "one two three")])
def test_a_stop_string_ends_the_request(rig, tokenizer: Tokenizer, include: bool, expected: str):
    async def main():
        async with rig(answer=says(tokenizer, "one two three four five six")) as r:
            sampling = {"stop": ["zzz", "three"], "include_stop": include, "logprobs": 0}
            events = await r.run(r.client.generate(PROMPT, sampling))
            assert text(events) == expected
            finished = events[-1]
            assert finished.reason == FinishReason.STOP
            assert finished.matched_stop == "three"
            assert finished.timings == TIMINGS
            await r.fake.until(lambda: r.fake.aborted == [FinishReason.STOP], stepping=False)
            kept = tokens(events)
            assert tokenizer.decode(kept).startswith("one two three")
            assert "three" not in tokenizer.decode(kept[:-1])
            assert finished.usage.completion_tokens == len(kept)
            assert sum(len(e.logprobs) for e in events if isinstance(e, Delta)) == len(kept)

    asyncio.run(main())


def test_tokens_after_a_stop_string_are_dropped(tokenizer: Tokenizer):
    sampling = SamplingParams(stop=("two",))
    stream = Stream(
        1, "id", 1, OutputText(tokenizer, [5], sampling), RequestTimes(0.0), Turns(), ()
    )
    words = tokenizer.encode("one two three", add_special_tokens=False)
    found = [stream.token(word, None) for word in words]
    assert found.count(True) == 1
    stream.done(Done(1, FinishReason.LENGTH, TIMINGS, len(words)))
    delta, finished = asyncio.run(stream.next()), asyncio.run(stream.next())
    assert delta == Delta(tuple(words[: found.index(True) + 1]), "one ")
    assert finished == Finished(FinishReason.STOP, Usage(1, len(delta.token_ids)), "two", TIMINGS)


def test_text_held_back_for_a_stop_string_comes_at_the_end(rig, tokenizer: Tokenizer):
    async def main():
        async with rig(answer=says(tokenizer, "one two thr")) as r:
            events = await r.run(r.client.generate(PROMPT, {"stop": ["three"]}))
            assert text(events) == "one two thr"
            assert events[-1].matched_stop == EOS

    asyncio.run(main())


def test_logprobs_belong_to_their_tokens(rig):
    async def main():
        async with rig() as r:
            plain = asyncio.ensure_future(r.read(r.client.generate([1], {"max_tokens": 5})))
            some = r.client.generate([2], {"max_tokens": 5, "logprobs": 2})
            events = await r.run(some)
            deltas = [e for e in events if isinstance(e, Delta)]
            for delta in deltas:
                assert delta.logprobs == tuple(
                    TokenLogprob(t, -0.5, ((t, -0.5), (t + 1, -1.5))) for t in delta.token_ids
                )
            await r.fake.until(plain.done)
            assert all(e.logprobs == () for e in plain.result() if isinstance(e, Delta))

    asyncio.run(main())


def test_a_slow_reader_gets_one_delta_and_delays_nobody(rig):
    async def main():
        async with rig() as r:
            slow = r.client.generate([1], {"max_tokens": 40})
            await r.started(slow)
            quick = await r.run(r.client.generate([2], {"max_tokens": 50}))
            assert len(tokens(quick)) == 50
            rest = await r.run(slow)
            assert [type(event) for event in rest] == [Delta, Finished]
            assert len(tokens(rest)) == 40

    asyncio.run(main())


def test_a_very_slow_reader_gets_deltas_of_bounded_size(tokenizer: Tokenizer):
    length = 2 * MAX_DELTA_TOKENS + 5
    text_of = OutputText(tokenizer, [5], SamplingParams())
    stream = Stream(1, "id", 1, text_of, RequestTimes(0.0), Turns(), ())
    word = tokenizer.encode("the", add_special_tokens=False)[0]
    for i in range(length):
        stream.token(word, TokenLogprob(word, -float(i)))
    deltas = [asyncio.run(stream.next()) for _ in range(3)]
    assert [len(d.token_ids) for d in deltas] == [MAX_DELTA_TOKENS, MAX_DELTA_TOKENS, 5]
    assert [p.logprob for d in deltas for p in d.logprobs] == [-float(i) for i in range(length)]
    assert [d.text for d in deltas] == ["", "", tokenizer.decode([word]) * length]


def test_a_full_queue_is_refused_and_may_be_tried_again(rig):
    async def main():
        async with rig(refuse="not now") as r:
            with pytest.raises(OverloadedError, match="not now"):
                await r.run(r.client.generate(PROMPT, {}, request_id="id"))
            r.fake.refuse = None
            assert await r.run(r.client.generate(PROMPT, {"max_tokens": 1}, request_id="id"))

    asyncio.run(main())


def test_a_request_the_engine_gave_up_on(rig):
    async def main():
        async with rig(fail_after=0) as r:
            with pytest.raises(UnavailableError, match="crashed"):
                await r.run(r.client.generate(PROMPT, {}))
            r.fake.fail_after = 2
            seen: list[Event] = []

            async def read():
                async for event in r.client.generate(PROMPT, {}):
                    seen.append(event)

            reader = asyncio.ensure_future(read())
            await r.fake.until(reader.done)
            assert isinstance(reader.exception(), RequestFailedError)
            assert len(tokens(seen)) == 2

    asyncio.run(main())


def test_when_the_coordinator_is_gone_every_request_ends(rig):
    async def main():
        async with rig() as r:
            fresh, begun = r.client.generate([1], {}), r.client.generate([2], {})
            await r.started(begun)
            r.fake.step()
            assert len(tokens([await anext(begun)])) == 1
            await r.started(fresh)
            r.client.connection_lost(StartupError("the coordinator died"))
            with pytest.raises(UnavailableError, match="the coordinator died"):
                await r.read(fresh)
            with pytest.raises(RequestFailedError, match="the coordinator died"):
                await r.read(begun)
            for call in (anext(r.client.generate([3], {})), r.client.stats()):
                with pytest.raises(UnavailableError, match="the coordinator died"):
                    await call

    asyncio.run(main())


def test_a_message_that_is_none_ends_every_request(rig, caplog: pytest.LogCaptureFixture):
    async def main():
        async with rig() as r:
            events = r.client.generate(PROMPT, {})
            await r.started(events)
            ((client, _),) = r.fake.running
            r.fake.hub._socket.send_multipart([client.encode(), b"\xc1 no message"])
            with pytest.raises(UnavailableError, match="link to the coordinator failed"):
                await asyncio.wait_for(r.read(events), 60)

    asyncio.run(main())
    assert "the link to the coordinator failed" in caplog.text


def test_closing_the_client_ends_its_requests(rig):
    async def main():
        async with rig() as r:
            events = r.client.generate(PROMPT, {})
            await r.started(events)
            await r.client.close()
            with pytest.raises(UnavailableError, match="closed"):
                await r.read(events)
            await r.fake.until(lambda: r.fake.aborted == [FinishReason.ABORT], stepping=False)
            await r.client.close()

    asyncio.run(main())


def test_stats(rig):
    async def main():
        async with rig() as r, aclosing(r.client.generate(PROMPT, {})) as events:
            await r.started(events)
            query = asyncio.ensure_future(r.client.stats())
            await r.fake.until(query.done, stepping=False)
            assert query.result().num_running == 1

    asyncio.run(main())


def test_connect_reads_tokenizer_and_defaults_from_the_model(
    run_dir: str, model_dir: str, tokenizer: Tokenizer
):
    async def main():
        with FakeCoordinator(run_dir) as fake:
            client = await EngineClient.connect(
                run_dir, layout(tokenizer.size), ModelConfig(path=model_dir)
            )
            rig = Rig(client, fake)
            assert len(tokens(await rig.run(client.generate("Hi", {"max_tokens": 2})))) == 2
            assert await client.decode(await client.encode("Hi 😀")) == "Hi 😀"
            await client.close()

    asyncio.run(main())


def test_a_caller_with_many_streams_does_not_make_another_one_wait(rig):
    """All have got a token at once; the reader of the one is served among the first."""

    async def main():
        async with rig() as r:
            read: list[str] = []

            async def follow(name: str) -> None:
                CALLER.set((name,))
                async for event in r.client.generate([1], {"max_tokens": 2}):
                    if isinstance(event, Delta):
                        read.append(name)
                        await asyncio.sleep(0)

            streams = [asyncio.create_task(follow("many")) for _ in range(10 * MAX_TURNS)]
            streams.append(asyncio.create_task(follow("alone")))
            submitted = r.fake.submitted
            await r.fake.until(lambda: len(submitted) == len(streams), stepping=False)
            r.fake.step()
            await asyncio.sleep(0.05)
            await r.fake.until(lambda: len(read) >= len(streams), stepping=False)
            assert read.index("alone") <= MAX_TURNS + 1
            await r.fake.until(lambda: all(stream.done() for stream in streams))
            await asyncio.gather(*streams)

    asyncio.run(main())


def test_text_that_cannot_be_made_ends_its_own_request_only(
    rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    push = OutputText.push

    def fail_for_9(self: OutputText, token_ids: Sequence[int]) -> str:
        if 9 in token_ids:
            raise ValueError("no text for 9")
        return push(self, token_ids)

    monkeypatch.setattr(OutputText, "push", fail_for_9)

    async def main():
        async with rig(answer=lambda request, _: request.prompt_token_ids[0]) as r:
            for sampling in ({"max_tokens": 4}, {"max_tokens": 4, "stop": ["x"]}):
                other = asyncio.ensure_future(r.read(r.client.generate([8], sampling)))
                with pytest.raises(RequestFailedError, match="text of this request"):
                    await r.run(r.client.generate([9], sampling))
                await r.fake.until(other.done)
                assert len(tokens(other.result())) == 4
            late = r.client.generate([9], {"max_tokens": 4})
            await r.started(late)
            await r.fake.until(lambda: not r.client._streams)  # all is there, and not read
            with pytest.raises(RequestFailedError, match="text of this request"):
                await r.read(late)
            assert r.client.observations.finished[ERROR] == 3
            assert not r.client._streams

    asyncio.run(main())
    assert caplog.text.count("no text for 9") >= 2
