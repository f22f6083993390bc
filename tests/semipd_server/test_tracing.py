"""Spans of generations, and what they must not tell."""

import asyncio
import functools
from typing import Any

import pytest
from fake_coordinator import TIMINGS
from openai_rig import request
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from server_rig import Start, read_all

from semipd_jax.errors import ConfigError
from semipd_server import settings as settings_module
from semipd_server.pb import inference_pb2 as pb
from semipd_server.settings import Settings
from semipd_server.tracing import TracedClient, Tracing

SECRET = "a prompt that nobody else may see"
ATTRIBUTES = {
    *("gen_ai.system", "gen_ai.request.model", "gen_ai.server.time_to_first_token"),
    *("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"),
    *("gen_ai.response.finish_reasons", "semipd.cached_tokens", "semipd.preemptions"),
}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(exporter: InMemorySpanExporter) -> Any:
    tracing = Tracing(SimpleSpanProcessor(exporter))
    return functools.partial(TracedClient, tracing.tracer)


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_generation_is_a_span_with_its_phases_in_the_callers_trace(
    start: Start, traced: Any, exporter: InMemorySpanExporter
):
    async def main():
        async with start(client=traced) as rig:
            message = pb.GenerateRequest(text=SECRET, sampling=pb.SamplingParams(max_tokens=3))
            call = rig.stub.Generate(message, metadata=(("traceparent", PARENT),))
            reading = asyncio.ensure_future(read_all(call))
            await rig.fake.until(reading.done)
            spans = by_name(exporter)
            assert set(spans) == {"generate", "queue", "prefill", "decode"}
            whole = spans["generate"]
            assert whole.kind is SpanKind.SERVER
            assert f"{whole.context.trace_id:032x}" == TRACE
            attributes = dict(whole.attributes or {})
            assert attributes["gen_ai.usage.output_tokens"] == 3
            assert attributes["gen_ai.response.finish_reasons"] == ("length",)
            assert attributes["gen_ai.request.model"] == "tiny"
            assert attributes["gen_ai.server.time_to_first_token"] > 0
            for name in ("queue", "prefill", "decode"):
                phase = spans[name]
                assert phase.parent is not None
                assert phase.parent.span_id == whole.context.span_id
                assert seconds(phase) == pytest.approx(getattr(TIMINGS, f"{name}_s"), abs=1e-6)

    asyncio.run(main())


def test_http_requests_and_their_choices_are_traced_too(
    start: Start, traced: Any, exporter: InMemorySpanExporter
):
    async def main():
        async with start(client=traced) as rig:
            body = {"prompt": SECRET, "n": 2, "max_tokens": 2}
            headers = {"traceparent": PARENT}
            reply = await request(rig, "POST", "/v1/completions", json=body, headers=headers)
            assert reply.status_code == 200
            wholes = [s for s in exporter.get_finished_spans() if s.name == "generate"]
            assert {f"{span.context.trace_id:032x}" for span in wholes} == {TRACE}
            assert len(wholes) == 2

    asyncio.run(main())


def test_spans_never_tell_what_was_said(start: Start, traced: Any, exporter: InMemorySpanExporter):
    async def main():
        async with start(client=traced) as rig:
            for body in (
                {"prompt": SECRET, "max_tokens": 2, "stop": ["nobody"]},
                {"prompt": SECRET * 100, "max_tokens": 2},
            ):
                await request(rig, "POST", "/v1/completions", json=body)
            chat = {"messages": [{"role": "user", "content": SECRET}]}
            await request(rig, "POST", "/v1/chat/completions", json=chat)
            spans = exporter.get_finished_spans()
            assert len(spans) >= 4
            for span in spans:
                told = span.to_json()
                assert "nobody" not in told
                assert set(span.attributes or ()) <= ATTRIBUTES  # no token ids either
                assert span.events == ()

    asyncio.run(main())


def test_a_failed_generation_says_which_error(
    start: Start, traced: Any, exporter: InMemorySpanExporter
):
    async def main():
        async with start(client=traced, refuse="the queue is full") as rig:
            await request(rig, "POST", "/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
            status = by_name(exporter)["generate"].status
            assert (status.status_code, status.description) == (
                StatusCode.ERROR,
                "OverloadedError",
            )

    asyncio.run(main())


def test_the_endpoint_is_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settings_module, "otel_is_installed", lambda: True)
    assert Settings(otlp_traces_endpoint="http://localhost:4318/v1/traces")
    with pytest.raises(ConfigError, match="otlp_traces_endpoint is 'localhost'"):
        Settings(otlp_traces_endpoint="localhost")
    monkeypatch.setattr(settings_module, "otel_is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"semipd-jax\[otel\]"):
        Settings(otlp_traces_endpoint="http://localhost:4318/v1/traces")
