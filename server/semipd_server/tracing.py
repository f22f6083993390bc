"""OpenTelemetry (extra `otel`): a span for each generation, with its phases inside.

Names are those of the GenAI conventions. Spans tell sizes, times and outcomes: never text, token
ids, or messages of errors, which may quote a request.
"""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from semipd_jax.client import EngineClient, Prompt
from semipd_jax.errors import EngineError
from semipd_jax.request import Delta, Event, Finished, Request, SamplingParams, Started
from semipd_server.trace_context import TRACE_CONTEXT

_SHUTDOWN_MS: Final = 5_000
_NS: Final = 1_000_000_000


class Tracing:
    """Sends spans to a collector.

    Args:
      processor: what takes the spans.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.name": "semipd"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("semipd_server")

    def close(self) -> None:
        """Sends what is left, for a few seconds at most."""
        self._provider.force_flush(_SHUTDOWN_MS)
        self._provider.shutdown()


def otlp_tracing(endpoint: str) -> Tracing:
    """To an OTLP collector over HTTP, in the background."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))


class TracedClient(EngineClient):
    """An engine client that records every generation."""

    def __init__(self, tracer: Tracer, *args: Any) -> None:
        super().__init__(*args)
        self._tracer = tracer

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams | Mapping[str, Any], **options: Any
    ) -> AsyncGenerator[Event]:
        """See `EngineClient.generate`."""
        async with aclosing(
            self._recorded(super().generate(prompt, sampling, **options))
        ) as events:
            async for event in events:
                yield event

    async def run(
        self, request: Request, request_id: str, seed: int | None = None
    ) -> AsyncGenerator[Event]:
        """See `EngineClient.run`."""
        async with aclosing(self._recorded(super().run(request, request_id, seed))) as events:
            async for event in events:
                yield event

    async def _recorded(self, generation: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
        parent = TraceContextTextMapPropagator().extract(TRACE_CONTEXT.get({}))
        attributes = {"gen_ai.system": "semipd", "gen_ai.request.model": self.model.name}
        span = self._tracer.start_span(
            "generate", context=parent, kind=SpanKind.SERVER, attributes=attributes
        )
        started_ns, is_first = time.time_ns(), True
        try:
            async with aclosing(generation) as events:
                async for event in events:
                    if isinstance(event, Delta) and is_first:
                        is_first = False
                        waited_s = (time.time_ns() - started_ns) / _NS
                        span.set_attribute("gen_ai.server.time_to_first_token", waited_s)
                    self._record(span, event)
                    yield event
        except EngineError as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            span.end()

    def _record(self, span: Span, event: Event) -> None:
        match event:
            case Started():
                span.set_attribute("gen_ai.usage.input_tokens", event.prompt_tokens)
                span.set_attribute("semipd.cached_tokens", event.cached_tokens)
            case Finished():
                span.set_attribute("gen_ai.usage.output_tokens", event.usage.completion_tokens)
                span.set_attribute("gen_ai.response.finish_reasons", [event.reason.value])
                span.set_attribute("semipd.preemptions", event.timings.num_preemptions)
                self._record_phases(span, event)

    def _record_phases(self, span: Span, finished: Finished) -> None:
        """Queue, prefill and decode, one after another, up to now."""
        timings, context = finished.timings, set_span_in_context(span)
        phases = {
            "queue": timings.queue_s,
            "prefill": timings.prefill_s,
            "decode": timings.decode_s,
        }
        at_ns = time.time_ns() - round(_NS * sum(phases.values()))
        for name, seconds in phases.items():
            phase = self._tracer.start_span(name, context=context, start_time=at_ns)
            at_ns += round(_NS * seconds)
            phase.end(at_ns)
