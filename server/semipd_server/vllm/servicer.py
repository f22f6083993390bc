"""The RPCs of `vllm.grpc.engine.VllmEngine`: generation by token ids, for a gateway in front.

What a request asks for and is not there is refused, as are the RPCs that this engine cannot serve.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final

import grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from semipd_jax.errors import RequestNotFoundError
from semipd_jax.request import Delta, Finished, Started, TokenLogprob
from semipd_server.choices import events, prepare
from semipd_server.gate import Gate
from semipd_server.limits import MAX_CHOICES
from semipd_server.servicer import Context, rpc, send
from semipd_server.vllm import limits
from semipd_server.vllm.convert import (
    field_path,
    logprobs_message,
    prompt_from,
    sampling_from,
    stop_fields,
)
from semipd_server.vllm.tokenizer import chunks, tokenizer_zip

SERVICE: Final = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
_STATS_TIMEOUT_S: Final = 2.0


@dataclass(slots=True)
class _Progress:
    """What one choice has brought so far."""

    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])


class VllmServicer(pb_grpc.VllmEngineServicer):
    """Serves what is behind the gate."""

    entries = limits.MAX_ENTRIES
    path_of = staticmethod(field_path)

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self._started_s = time.monotonic()

    # ------------------------------------------------------------ requests

    @rpc
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        engine = self.gate.admit()
        token_ids = await engine.client.encode(prompt_from(request))
        request_id = request.request_id or uuid.uuid4().hex
        wanted = await prepare(engine, [token_ids], *sampling_from(request.sampling_params))
        progress = [_Progress() for _ in range(len(wanted))]
        async with aclosing(events(engine, request_id, wanted)) as happening:
            async for index, event in happening:
                answer = self._answer(event, index, progress[index], len(token_ids))
                if request.stream:
                    progress[index].logprobs.clear()  # not again at the end: all might be too many
                if answer is not None and (request.stream or answer.HasField("complete")):
                    await send(context, answer)

    def _answer(
        self, event: Started | Delta | Finished, index: int, progress: _Progress, prompt_tokens: int
    ) -> pb.GenerateResponse | None:
        match event:
            case Started(cached_tokens=cached_tokens):
                progress.cached_tokens = cached_tokens
                return None
            case Delta(token_ids=token_ids, logprobs=logprobs):
                progress.token_ids += token_ids
                progress.logprobs += logprobs
                return _chunk(token_ids, logprobs, index, progress, prompt_tokens)
            case Finished():
                return _complete(event, index, progress, prompt_tokens)

    @rpc
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        """Those that are not running are left alone: they may just have ended."""
        client = self.gate.engine.client
        for request_id in request.request_ids:
            for index in range(MAX_CHOICES):
                with suppress(RequestNotFoundError):
                    await client.abort(f"{request_id}-{index}")
        return pb.AbortResponse()

    # ------------------------------------------------------------ about the server

    async def HealthCheck(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        problem = await self.gate.problem()
        return pb.HealthCheckResponse(healthy=problem is None, message=problem or "")

    @rpc
    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        engine = self.gate.engine
        info, client = engine.info, engine.client
        return pb.GetModelInfoResponse(
            model_path=info.name,
            served_model_name=info.name,
            tokenizer_path=info.name,
            is_generation=True,
            max_context_length=info.max_model_len,
            max_req_input_len=info.max_model_len - 1,
            vocab_size=info.vocab_size,
            architectures=[info.architecture],
            eos_token_ids=info.eos_token_ids,
            default_sampling_params_json=json.dumps(dict(client.generation_defaults)),
        )

    @rpc
    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        client = self.gate.engine.client
        stats = await client.stats(timeout_s=_STATS_TIMEOUT_S)
        return pb.GetServerInfoResponse(
            active_requests=stats.num_running + stats.num_waiting,
            uptime_seconds=time.monotonic() - self._started_s,
            server_type="vllm-grpc",  # names the contract
            data_parallel_size=1,
            block_size=client.layout.page_size,
            model_dtype=client.layout.dtype,
            max_num_seqs=client.layout.num_rows - 1,
        )

    @rpc
    async def GetLoads(  # noqa: N802
        self, request: pb.GetLoadsRequest, context: Context
    ) -> pb.GetLoadsResponse:
        client = self.gate.engine.client
        stats = await client.stats(timeout_s=_STATS_TIMEOUT_S)
        used = stats.num_pages - stats.num_free_pages
        queries = max(stats.prefix_cache_queries, 1)
        load = pb.SchedulerLoad(
            num_running_reqs=stats.num_running,
            num_waiting_reqs=stats.num_waiting,
            num_total_reqs=stats.num_running + stats.num_waiting,
            num_used_tokens=used * client.layout.page_size,
            max_total_num_tokens=stats.num_pages * client.layout.page_size,
            token_usage=used / max(stats.num_pages, 1),
            cache_hit_rate=stats.prefix_cache_hits / queries,
            max_running_requests=client.layout.num_rows - 1,
        )
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=version("semipd-jax"),
            dp_rank_count=1,
            loads=[load],
        )

    @rpc
    async def GetTokenizer(  # noqa: N802
        self, request: common.GetTokenizerRequest, context: Context
    ) -> None:
        path = self.gate.engine.client.model.tokenizer_path
        for chunk in chunks(await asyncio.to_thread(tokenizer_zip, path)):
            await send(context, chunk)

    # ------------------------------------------------------------ not here

    async def Embed(self, request: Any, context: Context) -> None:  # noqa: N802
        await _refuse(context, "this engine makes no embeddings")

    async def FlushCache(self, request: Any, context: Context) -> None:  # noqa: N802
        await _refuse(context, "the prefix cache cannot be flushed")

    async def StartProfile(self, request: Any, context: Context) -> None:  # noqa: N802
        await _refuse(context, "there is no profiler")

    async def StopProfile(self, request: Any, context: Context) -> None:  # noqa: N802
        await _refuse(context, "there is no profiler")

    async def SubscribeKvEvents(self, request: Any, context: Context) -> None:  # noqa: N802
        await _refuse(context, "KV events are not published; poll GetLoads")


def _chunk(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprob],
    index: int,
    progress: _Progress,
    prompt_tokens: int,
) -> pb.GenerateResponse | None:
    if not token_ids:  # text that lagged behind its tokens
        return None
    chunk = pb.GenerateStreamChunk(
        token_ids=token_ids,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(progress.token_ids),
        cached_tokens=progress.cached_tokens,
        output_logprobs=logprobs_message(logprobs),
        index=index,
    )
    return pb.GenerateResponse(chunk=chunk)


def _complete(
    finished: Finished, index: int, progress: _Progress, prompt_tokens: int
) -> pb.GenerateResponse:
    complete = pb.GenerateComplete(
        output_ids=progress.token_ids,
        finish_reason=finished.reason.value,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(progress.token_ids),
        cached_tokens=progress.cached_tokens,
        output_logprobs=logprobs_message(progress.logprobs),
        index=index,
        **stop_fields(finished),
    )
    return pb.GenerateResponse(complete=complete)


async def _refuse(context: Context, why: str) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
