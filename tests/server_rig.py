"""A whole front end in one process: server, engine client, and a coordinator without an engine."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from fake_coordinator import FakeCoordinator, layout
from tiny_tokenizers import save_byte_level

from semipd_jax.client import EngineClient
from semipd_jax.config import ModelConfig, SchedulerConfig
from semipd_jax.text.tokenizer import Tokenizer
from semipd_server.client import AsyncClient
from semipd_server.front_end import FrontEnd
from semipd_server.gate import Engine
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.settings import Settings

MAX_MODEL_LEN = 64
EOS = 1
INFO = pb.GetModelInfoResponse(
    name="tiny", architecture="LlamaForCausalLM", vocab_size=400, max_model_len=MAX_MODEL_LEN
)


@dataclass
class Rig:
    address: str
    url: str
    control: str
    front_end: FrontEnd
    engine: EngineClient
    fake: FakeCoordinator
    channel: grpc.aio.Channel
    client: AsyncClient

    @property
    def stub(self) -> Any:
        return pb_grpc.InferenceServiceStub(self.channel)


type Start = Callable[..., AbstractAsyncContextManager[Rig]]


async def read_all(call: Any) -> list[pb.GenerateResponse]:
    """What is left of a stream; raises the error that ends it."""
    responses: list[pb.GenerateResponse] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def sizes(tokenizer: Tokenizer):
    return layout(tokenizer.size, max_model_len=MAX_MODEL_LEN, eos=(EOS,))


@asynccontextmanager
async def serving(
    run_dir: str,
    tokenizer: Tokenizer,
    *,
    defaults: dict[str, Any] | None = None,
    max_calls: int = 1000,
    settings: Settings | None = None,
    path: str = "tiny",
    client: Callable[..., EngineClient] = EngineClient,
    limits: SchedulerConfig | None = None,
    **fields: Any,
) -> AsyncIterator[Rig]:
    """`path` is the model's, `client` makes the engine client, `limits`
    are the queue's; `fields` are the fake coordinator's.
    The test makes its steps."""
    model = ModelConfig(path=path)
    settings = settings or Settings(port=0, http_port=0)
    engine = client(run_dir, sizes(tokenizer), tokenizer, model, defaults or {}, settings.bounds)
    control_socket = settings.control_path(run_dir)
    front_end = FrontEnd(
        settings,
        max_model_len=MAX_MODEL_LEN,
        max_calls=max_calls,
        control_socket=control_socket,
    )
    with FakeCoordinator(run_dir, **fields) as fake:
        try:
            await engine.start()
            address, url = await front_end.start()
            await front_end.serve(Engine(engine, INFO, limits or SchedulerConfig()))
            async with (
                grpc.aio.insecure_channel(address) as channel,
                AsyncClient(address) as client,
            ):
                yield Rig(
                    address, url or "", f"unix:{control_socket}", front_end, engine, fake, channel,
                    client,
                )  # fmt: skip
        finally:
            await engine.close()
            await front_end.stop()


def save_model(directory: Path) -> str:
    """A model directory without weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 400,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return save_byte_level(directory)
