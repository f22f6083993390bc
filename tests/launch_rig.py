"""A launcher whose memory owner and workers are fakes without jax, and a client of its engine."""

import time
from pathlib import Path
from typing import Self

import numpy as np
from fake_device import next_token

from semipd_jax.config import EngineConfig, ModelConfig, ShareConfig, TimeoutConfig
from semipd_jax.launch.launcher import Launcher, Modules
from semipd_jax.messages import (
    FromCoordinator,
    Outputs,
    Partition,
    PartitionReply,
    SetPartition,
    Submit,
    ToCoordinator,
)
from semipd_jax.request import Request, SamplingParams
from semipd_jax.transport.channels import CLIENTS, Link

FAKES = Modules(owner="fake_owner", worker="fake_worker")
TESTS = Path(__file__).parent


def config(*, shares: ShareConfig | None = None, **timeouts: float) -> EngineConfig:
    times = {"startup_s": 120.0, "step_s": 60.0, **timeouts}
    return EngineConfig(
        model=ModelConfig(path="none"),
        timeouts=TimeoutConfig(**times),
        shares=shares or ShareConfig(),
    )


def wait_until(condition, *, timeout_s: float = 60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


class Client:
    def __init__(self, launcher: Launcher) -> None:
        self._link = Link[FromCoordinator, ToCoordinator](
            launcher.run_dir, CLIENTS, "test", FromCoordinator
        )

    def generate(self, handle: int, *, max_tokens: int, on_token=lambda n: None) -> list[int]:
        prompt = (5, 6, handle)
        sampling = SamplingParams(max_tokens=max_tokens, seed=handle)
        request = Request(request_id=str(handle), prompt_token_ids=prompt, sampling=sampling)
        self._link.send(Submit(handle, request))
        tokens: list[int] = []
        while True:
            message = self._link.receive(60.0)
            assert message is not None, "no answer"
            if isinstance(message, Outputs):
                new = np.frombuffer(message.token_ids, np.int32).tolist()
                tokens += new
                if new:
                    on_token(len(tokens))
                if message.done:
                    assert message.done[0].error is None
                    return tokens

    def shares(self, **shares: float) -> Partition:
        """After a change to those given. Only while nothing is generated."""
        self._link.send(SetPartition(1, **shares))
        report = self._link.receive(60.0)
        assert isinstance(report, PartitionReply)
        return report.partition

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()


def expected(handle: int, max_tokens: int) -> list[int]:
    output: list[int] = []
    while len(output) < max_tokens:
        output.append(next_token([5, 6, handle, *output], handle))
    return output
