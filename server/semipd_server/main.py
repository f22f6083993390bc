"""`python -m semipd_server.main`: the front end, a child process of the launcher."""

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from semipd_jax.child import Child, Command, freeze_heap, run_child
from semipd_jax.client import EngineClient
from semipd_jax.client.sampling import load_generation_defaults
from semipd_jax.config import EngineConfig
from semipd_jax.errors import EngineError, UnavailableError
from semipd_jax.messages import Drain, MemoryLayout, Serve, WaitingFor
from semipd_jax.models.registry import load_spec
from semipd_jax.text.tokenizer import load_tokenizer
from semipd_server.front_end import FrontEnd
from semipd_server.gate import SHUTTING_DOWN, Engine
from semipd_server.pb import inference_pb2 as pb
from semipd_server.settings import Settings

_SPARE_CALLS: Final = 256  # beside those that generate: aborts, health checks and their like


def main(child: Child) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is an open file
    asyncio.run(_run(child))


async def _run(child: Child) -> None:
    """Binds the ports at once, loads what text needs, then does what the launcher says."""
    config = child.spec.config
    model = load_spec(config.model.path)
    limits = config.scheduler
    settings = Settings.from_extra(child.spec.extra)
    front_end = FrontEnd(
        settings,
        max_model_len=model.max_len(config.model.max_model_len),
        max_calls=limits.max_num_seqs + limits.max_num_queued_reqs + _SPARE_CALLS,
        control_socket=settings.control_path(child.spec.run_dir),
    )
    closing = ExitStack()
    try:
        address, http_address = await front_end.start()
        tokenizer = await asyncio.to_thread(load_tokenizer, config.model.tokenizer_path)
        defaults = load_generation_defaults(config.model.path)
        child.ready(address=address, http_address=http_address)
        commands = _commands(child)
        layout = await _until_all_is_ready(commands, front_end)
        if layout is None:
            return
        parts = (child.spec.run_dir, layout, tokenizer, config.model, defaults, settings.bounds)
        client = closing.enter_context(_engine_client(settings, *parts))
        await client.start()
        freeze_heap()
        await front_end.serve(Engine(client, _info(config, model.architecture, layout), limits))
        ended = asyncio.ensure_future(
            _until_the_end(commands, front_end, config.timeouts.shutdown_s)
        )
        failed = asyncio.ensure_future(client.failed.wait())
        await asyncio.wait((ended, failed), return_when=asyncio.FIRST_COMPLETED)
        if client.failed.is_set():
            raise EngineError("the link to the coordinator failed")
        failed.cancel()
        await ended
        client.connection_lost(UnavailableError(SHUTTING_DOWN))
        await front_end.stop()
        await client.close()
    finally:
        await front_end.stop()
        await asyncio.to_thread(closing.close)


@contextmanager
def _engine_client(settings: Settings, *parts: Any) -> Iterator[EngineClient]:
    """Made of these parts; its generations are traced if the settings say so."""
    if settings.otlp_traces_endpoint is None:
        yield EngineClient(*parts)
        return
    from semipd_server.tracing import TracedClient, otlp_tracing  # needs the extra `otel`

    tracing = otlp_tracing(settings.otlp_traces_endpoint)
    try:
        yield TracedClient(tracing.tracer, *parts)
    finally:
        tracing.close()


async def _commands(child: Child) -> AsyncIterator[Command]:
    """What the launcher says, until it says nothing more: stop now."""
    woken = asyncio.Event()
    asyncio.get_running_loop().add_reader(child.fileno(), woken.set)
    while not child.stopping.is_set():
        await woken.wait()
        woken.clear()
        for command in child.receive():
            yield command


async def _until_all_is_ready(
    commands: AsyncIterator[Command], front_end: FrontEnd
) -> MemoryLayout | None:
    """The layout to serve with, or None if the end came first."""
    async for command in commands:
        match command:
            case Serve(layout=layout):
                return layout
            case WaitingFor(parts=parts):
                await front_end.set_waiting_for(parts)
            case Drain():
                return None
    return None


async def _until_the_end(
    commands: AsyncIterator[Command], front_end: FrontEnd, shutdown_s: float
) -> None:
    """Returns when running requests have ended after a Drain, or at once when told to stop."""
    async for command in commands:
        if isinstance(command, WaitingFor):
            await front_end.set_waiting_for(command.parts)
        if isinstance(command, Drain):
            break
    drained = asyncio.ensure_future(front_end.drain(shutdown_s))
    stopped = asyncio.ensure_future(_until_stopped(commands))
    done, running = await asyncio.wait((drained, stopped), return_when=asyncio.FIRST_COMPLETED)
    for task in running:
        task.cancel()
    await asyncio.gather(*done)


async def _until_stopped(commands: AsyncIterator[Command]) -> None:
    async for _ in commands:
        pass


def _info(config: EngineConfig, architecture: str, layout: MemoryLayout) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        name=config.model.name,
        architecture=architecture,
        dtype=layout.dtype,
        vocab_size=layout.vocab_size,
        max_model_len=layout.max_model_len,
        eos_token_ids=layout.eos_token_ids,
        kv_capacity_tokens=(layout.num_pages - 1) * layout.page_size,
    )


if __name__ == "__main__":
    run_child(main)
