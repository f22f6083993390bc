"""`python -m semipd_jax.serve` as a user runs it."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serve_rig import Server, serving

from semipd_jax.errors import EngineError
from semipd_jax.request import Delta, Finished, FinishReason
from semipd_server.client import Client


@contextmanager
def started(log: Path, compile_cache: str) -> Iterator[tuple[Server, str]]:
    """A server and its address."""
    flags = ("--compile-cache-dir", compile_cache, "--shutdown-timeout", "120")
    with serving(log, *flags) as server:
        yield server, server.wait_for(r"is served at (\S+) after")[1]


@pytest.fixture
def running(tmp_path, compile_cache) -> Iterator[tuple[Server, str]]:
    """For a test that ends it."""
    with started(tmp_path / "log", compile_cache) as running:
        yield running


@pytest.fixture(scope="module")
def lasting(tmp_path_factory, compile_cache) -> Iterator[str]:
    """The address of a server for all tests that leave it as it is."""
    with started(tmp_path_factory.mktemp("serve") / "log", compile_cache) as (_, target):
        yield target


def health(target: str) -> health_pb2.HealthCheckResponse.ServingStatus:
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status


def wait_until_draining(target: str) -> None:
    deadline = time.monotonic() + 60
    with contextlib.suppress(grpc.RpcError):  # it is gone already
        while health(target) == health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() < deadline, "the server does not drain"
            time.sleep(0.01)


def test_serves_then_drains_at_sigterm(running):
    server, target = running
    assert health(target) == health_pb2.HealthCheckResponse.SERVING
    assert re.search(r"KV cache: [\d,]+ tokens", server.log)
    assert "python -m semipd_server.client --target" in server.log
    with Client(target) as client:
        assert client.complete("def main():\n", max_tokens=20, temperature=0.0)
        family = list(server.family().values())
        events = client.generate([5, 6, 7], max_tokens=2000, ignore_eos=True)
        assert next(events) is not None
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(target)
        with pytest.raises(EngineError), Client(target) as late:
            late.complete("too late", max_tokens=1)
        ended = [*events][-1]
        assert isinstance(ended, Finished)
        assert ended.reason is FinishReason.LENGTH, "a running request did not finish"
    assert server.process.wait(60) == 0
    assert not psutil.wait_procs(family, timeout=60)[1]


def test_second_signal_ends_now(running):
    server, target = running
    family = list(server.family().values())
    with Client(target) as client:
        events = client.generate([5, 6, 7], max_tokens=1500, ignore_eos=True)
        next(events)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("stopping")
        server.process.send_signal(signal.SIGINT)
        server.process.wait(60)
        with pytest.raises(EngineError):
            for _ in events:
                pass
    assert not psutil.wait_procs(family, timeout=60)[1]


@pytest.mark.parametrize("name", ["front end", "coordinator", "memory owner"])
def test_death_of_a_process_that_cannot_be_replaced_ends_the_server(running, name):
    server, target = running
    family = server.family()
    outcome: list[object] = []
    begun = threading.Event()

    def stream() -> None:
        with Client(target) as client:
            try:
                for event in client.generate([5, 6, 7], max_tokens=1500, ignore_eos=True):
                    outcome.append(event)
                    begun.set()
            except (EngineError, grpc.RpcError) as error:
                outcome.append(error)

    streaming = threading.Thread(target=stream)
    streaming.start()
    assert begun.wait(60)
    family[name].kill()
    assert server.process.wait(60) == 1
    streaming.join(60)
    assert not streaming.is_alive(), "the client hangs"
    assert isinstance(outcome[-1], EngineError), outcome[-1]
    assert f"{name} was killed by signal 9" in server.log
    assert not psutil.wait_procs(list(family.values()), timeout=60)[1]


def test_a_port_in_use_is_refused_with_the_reason(tmp_path, lasting):
    with serving(tmp_path / "second", f"--port={lasting.rsplit(':', 1)[1]}") as second:
        assert second.process.wait(120) == 1
        assert "in use" in second.log.lower()


def test_text_of_a_stream_is_the_text_of_its_tokens(lasting):
    with Client(lasting) as client:
        for prompt in ("def f(x):\n    return ", "# Grüße, 世界 🌍\n"):
            deltas = [
                e
                for e in client.generate(prompt, max_tokens=40, temperature=0.0)
                if isinstance(e, Delta)
            ]
            tokens = [t for delta in deltas for t in delta.token_ids]
            before = client.tokenize(prompt)
            whole = client.detokenize([*before, *tokens])
            assert client.detokenize(before) + "".join(d.text for d in deltas) == whole
