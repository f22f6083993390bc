"""`python -m semipd_server.main`: the front end, a child process of the launcher."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from semipd_jax.child import Child, Command, run_child
from semipd_jax.client import EngineClient
from semipd_jax.client.sampling import load_generation_defaults
from semipd_jax.config import EngineConfig
from semipd_jax.errors import EngineError, UnavailableError
from semipd_jax.messages import Drain, MemoryLayout, Serve
from semipd_jax.models.registry import load_spec
from semipd_jax.text.tokenizer import load_tokenizer
from semipd_server.pb import inference_pb2 as pb
from semipd_server.server import SHUTTING_DOWN, Server
from semipd_server.servicer import Engine

_SPARE_RPCS: Final = 256  # beside those that generate: aborts, health checks and their like


def main(child: Child) -> None:
    asyncio.run(_run(child))


async def _run(child: Child) -> None:
    """Binds the port at once, loads what text needs, then does what the launcher says."""
    config, extra = child.spec.config, child.spec.extra
    model = load_spec(config.model.path)
    limits = config.scheduler
    server = Server(
        max_model_len=config.model.max_model_len or model.max_model_len,
        max_rpcs=limits.max_num_seqs + limits.max_num_queued_reqs + _SPARE_RPCS,
    )
    address = await server.start(extra["host"], int(extra["port"]))
    try:
        tokenizer = await asyncio.to_thread(load_tokenizer, config.model.tokenizer_path)
        defaults = load_generation_defaults(config.model.path)
        child.ready(address=address)
        commands = _commands(child)
        layout = await _until_all_is_ready(commands)
        if layout is None:
            return
        client = EngineClient(child.spec.run_dir, layout, tokenizer, config.model, defaults)
        await client.start()
        await server.serve(Engine(client, _info(config, model.architecture, layout)))
        ended = asyncio.ensure_future(_until_the_end(commands, server, config.timeouts.shutdown_s))
        failed = asyncio.ensure_future(client.failed.wait())
        await asyncio.wait((ended, failed), return_when=asyncio.FIRST_COMPLETED)
        if client.failed.is_set():
            raise EngineError("the link to the coordinator failed")
        failed.cancel()
        client.connection_lost(UnavailableError(SHUTTING_DOWN))
        await server.stop()
        await client.close()
    finally:
        await server.stop()


async def _commands(child: Child) -> AsyncIterator[Command]:
    """What the launcher says, until it says nothing more: stop now."""
    woken = asyncio.Event()
    asyncio.get_running_loop().add_reader(child.fileno(), woken.set)
    while not child.stopping.is_set():
        await woken.wait()
        woken.clear()
        for command in child.receive():
            yield command


async def _until_all_is_ready(commands: AsyncIterator[Command]) -> MemoryLayout | None:
    """The layout to serve with, or None if the end came first."""
    async for command in commands:
        if isinstance(command, Serve):
            return command.layout
        if isinstance(command, Drain):
            return None
    return None


async def _until_the_end(
    commands: AsyncIterator[Command], server: Server, shutdown_s: float
) -> None:
    """Returns when running requests have ended after a Drain, or at once when told to stop."""
    async for command in commands:
        if isinstance(command, Drain):
            break
    drained = asyncio.ensure_future(server.drain(shutdown_s))
    stopped = asyncio.ensure_future(_until_stopped(commands))
    await asyncio.wait((drained, stopped), return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()
    stopped.cancel()


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
