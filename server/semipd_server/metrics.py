"""What Prometheus is told: vLLM's names under a prefix of ours.

Nothing is counted here. Counts of requests are the engine client's `Observations`; the state of the
engine is the coordinator's `Stats`, asked for at each scrape. Labels are the model's name and words
of fixed lists: nothing that a client can choose.
"""

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from semipd_jax.client.observations import Histogram, Observations
from semipd_jax.errors import UnavailableError
from semipd_jax.messages import MemoryLayout, Partition, Phase, PredictionError, Stats
from semipd_server.calls import Calls
from semipd_server.control_convert import pages_by_state
from semipd_server.gate import Gate

_STATS_TIMEOUT_S: Final = 2.0
_LABELS: Final = ("model_name", "engine")
_ENGINE: Final = "0"  # vLLM numbers the engines of a server; here there is one
_VERSION: Final = re.compile(r"version=([^;]*)")
_KNOWN_VERSIONS: Final = ([], ["0.0.1"], ["0.0.4"], ["1.0.0"])
_UP: Final = "1 if new requests are taken and the coordinator answers"

_REQUEST_COUNTERS: Final = (
    ("prompt_tokens", "Prompt tokens of admitted requests", "num_prompt_tokens"),
    ("generation_tokens", "Tokens generated", "num_output_tokens"),
)
_REQUEST_COUNTERS_BY_WORD: Final = (
    ("request_success", "Requests that ended, by reason", "finished_reason", "finished"),
    ("request_refusals", "Requests that never ran, by reason", "reason", "refused"),
)
_REQUEST_HISTOGRAMS: Final = (
    ("time_to_first_token_seconds", "Arrival to first token", "ttft_s"),
    ("inter_token_latency_seconds", "Between two tokens of a request", "itl_s"),
    ("request_time_per_output_token_seconds", "A request's mean after its first token", "tpot_s"),
    ("e2e_request_latency_seconds", "Arrival to the end of a request", "e2e_s"),
    ("request_queue_time_seconds", "Waiting for prefill", "queue_s"),
    ("request_prefill_time_seconds", "In prefill", "prefill_s"),
    ("request_decode_time_seconds", "In decode", "decode_s"),
    ("request_inference_time_seconds", "In prefill and decode", "inference_s"),
    ("request_prompt_tokens", "Prompt tokens of a request", "request_prompt_tokens"),
    ("request_generation_tokens", "Tokens that a request generated", "request_output_tokens"),
)
_ENGINE_GAUGES: Final = (
    ("num_requests_running", "Requests that hold a row", "num_running"),
    ("num_requests_waiting", "Requests in the queue, or that wait for a grammar", "num_waiting"),
    ("kv_cached_pages", "KV pages that the prefix cache can find", "num_cached_pages"),
    ("coordinator_step_seconds_mean", "Coordinator's time per reply, mean", "mean_plan_s"),
    ("coordinator_step_seconds_max", "Coordinator's time per reply, longest", "max_plan_s"),
)
_ENGINE_COUNTERS: Final = (
    ("num_preemptions", "Requests that gave their pages up", "num_preemptions"),
    ("prefix_cache_queries", "Prompt tokens looked up", "prefix_cache_queries"),
    ("prefix_cache_hits", "Prompt tokens found", "prefix_cache_hits"),
    ("prefill_steps", "Prefill steps", "num_prefill_steps"),
    ("decode_steps", "Decode steps", "num_decode_steps"),
    ("compiles_after_warmup", "Programs compiled while serving", "num_compiles"),
)
"""Name, text, (label,) attribute of `Observations` or `Stats`."""

_PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")


class Metrics:
    """Renders all metrics of this process and its engine.

    Args:
      prefix: of every name that is ours, before a colon.
    """

    def __init__(self, gate: Gate, prefix: str) -> None:
        self._gate = gate
        self._prefix = prefix
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The body of a scrape and its content type, by the Accept header. Written in a thread."""
        families = await self._families()
        encode, content_type = choose_encoder(_known_formats(accept))
        registry = CollectorRegistry()
        registry.register(_Families([*families, *self._process.collect()]))
        return await asyncio.to_thread(encode, registry), content_type

    async def _families(self) -> list[Metric]:
        try:
            engine = self._gate.engine
            stats = await engine.client.stats(timeout_s=_STATS_TIMEOUT_S)
        except UnavailableError:
            return [GaugeMetricFamily(f"{self._prefix}:up", _UP, 0)]
        names = _Names(self._prefix, (engine.info.name, _ENGINE))
        client = engine.client
        return [
            GaugeMetricFamily(f"{self._prefix}:up", _UP, int(self._gate.refusal is None)),
            *names.of_requests(client.observations),
            *names.of_engine(stats, client.layout),
            *names.of_calls(self._gate.calls),
        ]


def _known_formats(accept: str) -> str:
    """The entries of an Accept header without those of versions that `choose_encoder` trips over or
    takes for ones that it can write."""

    def is_known(entry: str) -> bool:
        return [version.rstrip() for version in _VERSION.findall(entry)] in _KNOWN_VERSIONS

    return ",".join(filter(is_known, accept.split(",")))


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class _Names:
    """Counts to metrics.

    Args:
      labels: values of `_LABELS`.
    """

    def __init__(self, prefix: str, labels: tuple[str, str]) -> None:
        self._prefix = prefix
        self._labels = labels

    def of_requests(self, seen: Observations) -> Iterator[Metric]:
        for name, text, attribute in _REQUEST_COUNTERS:
            yield self._counter(name, text, getattr(seen, attribute))
        for name, text, label, attribute in _REQUEST_COUNTERS_BY_WORD:
            yield self._by_word(name, text, label, getattr(seen, attribute))
        for name, text, attribute in _REQUEST_HISTOGRAMS:
            yield self._histogram(name, text, getattr(seen, attribute))

    def of_calls(self, calls: Calls) -> Iterator[Metric]:
        yield self._gauge(
            "grpc_calls_running",
            "gRPC calls, but for health and reflection, that have not ended",
            calls.num_running,
        )
        labels = (*_LABELS, "method", "status")
        text = "gRPC calls that ended, by method and status"
        family = CounterMetricFamily(f"{self._prefix}:grpc_calls", text, labels=labels)
        for key, count in calls.ended.items():
            family.add_metric((*self._labels, *key), count)
        yield family

    def of_engine(self, stats: Stats, layout: MemoryLayout) -> Iterator[Metric]:
        for name, text, attribute in _ENGINE_GAUGES:
            yield self._gauge(name, text, getattr(stats, attribute))
        for name, text, attribute in _ENGINE_COUNTERS:
            yield self._counter(name, text, getattr(stats, attribute))
        pages = {(state,): n for state, n in pages_by_state(stats).items()}
        yield self._gauges("kv_pages", "KV pages, by state", ("state",), pages)
        share = 1.0 - stats.num_free_pages / max(stats.num_pages, 1)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV pages not free, 0 to 1", share)
        restarts = {p: getattr(stats, f"num_{p}_restarts") for p in _PHASES}
        yield self._by_word("worker_restarts", "Workers that were replaced", "phase", restarts)
        yield from self._of_partition(stats.partition)
        yield from self._of_promises(stats)
        yield self._prediction_error(stats)
        yield self._cache_config(layout)

    def _of_partition(self, partition: Partition) -> Iterator[Metric]:
        shares = {p: getattr(partition, p) for p in _PHASES}
        asked = {(p, "asked"): s.asked for p, s in shares.items()}
        current = {(p, "current"): s.current for p, s in shares.items() if s.current is not None}
        text = "Share of the compute, as chosen and of the last step"
        yield self._gauges("sm_share", text, ("phase", "kind"), asked | current)
        changes = {p: s.num_switches for p, s in shares.items()}
        yield self._by_word("partition_changes", "Steps at another share", "phase", changes)

    def _of_promises(self, stats: Stats) -> Iterator[Metric]:
        """Without a promise there is no target, and every request that was served met it. What
        counts as a request: see `messages.SloCounts`."""
        default, slo, recent = stats.partition.slos[0], stats.slo, stats.recent
        targets = {
            (name,): ms / 1e3
            for name, ms in (("ttft", default.ttft_ms), ("tpot", default.tpot_ms))
            if ms is not None
        }
        yield self._gauges("slo_target_seconds", "What is promised", ("slo",), targets)
        yield self._gauge(
            "slo_attainment_target", "Share that should meet both", stats.partition.slo_target
        )
        met = {"ttft": slo.num_ttft_met, "tpot": slo.num_tpot_met, "both": slo.num_met}
        yield self._by_word("slo_met_requests", "Requests that met a target", "slo", met)
        text = "Requests that had a target to meet, also those that failed or found no room"
        yield self._counter("slo_requests", text, slo.num_ended)
        text = "Requests that met both targets"
        yield self._counter("goodput_requests", text, slo.num_met)
        text = f"Share of the requests of the last {recent.window_s:.0f} s that met both targets"
        part = recent.num_met / recent.num_ended if recent.num_ended else float("nan")
        yield self._gauge("slo_attainment", text, part)

    def _prediction_error(self, stats: Stats) -> Metric:
        family = SummaryMetricFamily(
            f"{self._prefix}:step_prediction_error",
            "Of step times, as a part of the prediction",
            labels=(*_LABELS, "phase"),
        )
        for phase in _PHASES:
            error: PredictionError = getattr(stats, f"{phase}_error")
            family.add_metric((*self._labels, phase), error.count, error.total)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _by_word(self, name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=(*_LABELS, label))
        for word, count in counts.items():
            family.add_metric((*self._labels, str(word)), count)
        return family

    def _gauges(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        values: Mapping[tuple[str, ...], float],
    ) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=(*_LABELS, *labels))
        for words, value in values.items():
            family.add_metric((*self._labels, *words), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        total, buckets = 0, []
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), total))
        family = HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, buckets, histogram.sum)
        return family

    def _cache_config(self, layout: MemoryLayout) -> Metric:
        """As vLLM tells it, for schedulers that read it."""
        labels = ("engine", "block_size", "num_gpu_blocks")
        family = GaugeMetricFamily(
            f"{self._prefix}:cache_config_info", "Sizes of the KV pool", labels=labels
        )
        family.add_metric((_ENGINE, str(layout.page_size), str(layout.num_pages - 1)), 1)
        return family
