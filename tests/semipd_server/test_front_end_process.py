"""The front end as the launcher runs it: a real process."""

import asyncio
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
import msgspec
import pytest
from fake_coordinator import FakeCoordinator
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_rig import MAX_MODEL_LEN, read_all, sizes

from semipd_jax.config import EngineConfig, ModelConfig, TimeoutConfig
from semipd_jax.messages import ChildSpec, Drain, Failed, FromChild, Ready, Serve, WaitingFor
from semipd_jax.text.tokenizer import Tokenizer
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.settings import Settings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
TIMEOUT_S = 60

_decoder = msgspec.json.Decoder[Any](FromChild)


@dataclass
class FrontEnd:
    process: asyncio.subprocess.Process

    def tell(self, message: msgspec.Struct) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(message) + b"\n")

    async def hear(self) -> Any:
        assert self.process.stdout is not None
        return _decoder.decode(await asyncio.wait_for(self.process.stdout.readline(), TIMEOUT_S))

    async def exit_status(self) -> int:
        return await asyncio.wait_for(self.process.wait(), TIMEOUT_S)

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


type Start = Callable[..., AbstractAsyncContextManager[FrontEnd]]


@pytest.fixture
def start(run_dir: str, model_dir: str) -> Start:
    @asynccontextmanager
    async def start(
        port: int = 0, model: str = model_dir, shutdown_s: float = 60.0
    ) -> AsyncIterator[FrontEnd]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "semipd_server.main",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        front_end = FrontEnd(process)
        _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (256, most_files))
        try:
            config = EngineConfig(
                model=ModelConfig(path=model, served_name="tiny"),
                timeouts=TimeoutConfig(shutdown_s=shutdown_s),
            )
            extra = Settings(port=port, http_port=0).to_extra()
            front_end.tell(ChildSpec(name="front end", run_dir=run_dir, config=config, extra=extra))
            yield front_end
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    return start


@asynccontextmanager
async def channel_to(front_end: FrontEnd) -> AsyncIterator[grpc.aio.Channel]:
    ready = await front_end.hear()
    assert isinstance(ready, Ready), ready
    assert ready.address is not None
    async with grpc.aio.insecure_channel(ready.address) as channel:
        yield channel


async def health(channel: grpc.aio.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)).status


async def until_serving(channel: grpc.aio.Channel) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    while (await watch.read()).status != SERVING:
        pass
    watch.cancel()
    return pb_grpc.InferenceServiceStub(channel)


def request(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Grüße", sampling=pb.SamplingParams(**sampling))


async def begun(fake: FakeCoordinator, call: Any) -> None:
    """Waits for the first event; no step is made."""
    first = asyncio.ensure_future(call.read())
    await fake.until(first.done, stepping=False)


def test_a_front_ends_life(start: Start, run_dir: str, tokenizer: Tokenizer):
    async def main():
        with FakeCoordinator(run_dir) as fake:
            async with start() as front_end, channel_to(front_end) as channel:
                stub: Any = pb_grpc.InferenceServiceStub(channel)
                assert await health(channel) == NOT_SERVING
                files, most_files = resource.prlimit(front_end.process.pid, resource.RLIMIT_NOFILE)
                assert files == most_files, "connections would run out of files"
                with pytest.raises(grpc.aio.AioRpcError, match="starting"):
                    await stub.GetModelInfo(pb.GetModelInfoRequest())

                front_end.tell(Serve(layout=sizes(tokenizer)))
                await until_serving(channel)
                info = await stub.GetModelInfo(pb.GetModelInfoRequest())
                assert (info.name, info.architecture, info.dtype) == (
                    "tiny", "LlamaForCausalLM", "float32",
                )  # fmt: skip
                assert info.max_model_len == MAX_MODEL_LEN
                assert info.kv_capacity_tokens == 100 * 16

                call = stub.Generate(request(max_tokens=5))
                await begun(fake, call)
                front_end.tell(Drain())
                while await health(channel) == SERVING:
                    await asyncio.sleep(0.01)
                with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as refused:
                    await stub.Generate(request()).read()
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
                reader = asyncio.ensure_future(read_all(call))
                await fake.until(reader.done)
                assert reader.result()[-1].finished.usage.completion_tokens == 5
                assert await front_end.exit_status() == 0

    asyncio.run(main())


def test_what_the_launcher_waits_for_is_shown(start: Start, run_dir: str, tokenizer: Tokenizer):
    async def main():
        with FakeCoordinator(run_dir) as fake:
            async with start() as front_end:
                ready = await front_end.hear()
                async with (
                    httpx2.AsyncClient(base_url=ready.http_address, timeout=TIMEOUT_S) as client,
                    grpc.aio.insecure_channel(ready.address) as channel,
                ):

                    async def until(status: int, text: str) -> None:
                        async with asyncio.timeout(TIMEOUT_S):
                            while True:
                                asking = asyncio.ensure_future(client.get("/health"))
                                await fake.until(asking.done, stepping=False)
                                reply = asking.result()
                                if reply.status_code == status and text in reply.text:
                                    return

                    await until(503, "starting")
                    front_end.tell(WaitingFor(parts=("memory owner: load 3/10",)))
                    await until(503, "memory owner: load 3/10")
                    assert await health(channel) == NOT_SERVING
                    front_end.tell(Serve(layout=sizes(tokenizer)))
                    await until(200, "ok")
                    assert await health(channel) == SERVING
                    front_end.tell(WaitingFor(parts=("decode worker 1.00: not ready",)))
                    await until(503, "decode worker")
                    assert await health(channel) == NOT_SERVING
                    front_end.tell(WaitingFor(parts=()))
                    await until(200, "ok")
                    assert await health(channel) == SERVING

    asyncio.run(main())


def test_draining_ends_after_the_timeout(start: Start, run_dir: str, tokenizer: Tokenizer):
    async def main():
        with FakeCoordinator(run_dir) as fake:
            async with start(shutdown_s=0.2) as front_end, channel_to(front_end) as channel:
                front_end.tell(Serve(layout=sizes(tokenizer)))
                call = (await until_serving(channel)).Generate(request())
                await begun(fake, call)
                front_end.tell(Drain())
                with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as error:
                    await read_all(call)
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
                assert await front_end.exit_status() == 0

    asyncio.run(main())


@pytest.mark.parametrize("draining", [False, True])
def test_when_the_launcher_is_gone_streams_end_and_so_does_the_process(
    start: Start, run_dir: str, tokenizer: Tokenizer, draining: bool
):
    async def main():
        with FakeCoordinator(run_dir) as fake:
            async with start() as front_end, channel_to(front_end) as channel:
                front_end.tell(Serve(layout=sizes(tokenizer)))
                call = (await until_serving(channel)).Generate(request())
                await begun(fake, call)
                fake.step()
                await call.read()
                if draining:
                    front_end.tell(Drain())
                    while await health(channel) == SERVING:
                        await asyncio.sleep(0.01)
                front_end.end_input()
                with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as error:
                    await read_all(call)
                assert error.value.code() is grpc.StatusCode.ABORTED
                assert await front_end.exit_status() == 0

    asyncio.run(main())


@pytest.mark.parametrize("say", ["end of input", "drain"])
def test_it_can_be_stopped_before_there_is_an_engine(start: Start, say: str):
    async def main():
        async with start() as front_end, channel_to(front_end):
            if say == "drain":
                front_end.tell(Drain())
            else:
                front_end.end_input()
            assert await front_end.exit_status() == 0

    asyncio.run(main())


def test_a_taken_port_fails_the_start(start: Start):
    async def main():
        async with start() as first:
            ready = await first.hear()
            port = int(ready.address.rsplit(":", 1)[1])
            async with start(port=port) as second:
                failed = await second.hear()
                assert isinstance(failed, Failed)
                assert failed.kind == "StartupError"
                assert f"cannot listen on 127.0.0.1:{port}" in failed.message
                assert await second.exit_status() == 1

    asyncio.run(main())


def test_a_model_without_tokenizer_fails_the_start(start: Start, model_dir: str, tmp_path: Path):
    (tmp_path / "config.json").write_text((Path(model_dir) / "config.json").read_text())

    async def main():
        async with start(model=str(tmp_path)) as front_end:
            failed = await front_end.hear()
            assert isinstance(failed, Failed)
            assert failed.kind == "CheckpointError"
            assert "tokenizer.json" in failed.message
            assert await front_end.exit_status() == 1

    asyncio.run(main())


def test_neither_jax_nor_torch_is_imported(model_dir: str):
    code = (
        "import sys, semipd_server.main as m;"
        f"m.load_tokenizer({model_dir!r});"
        "sys.exit(bool({'torch', 'jax', 'flax'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
