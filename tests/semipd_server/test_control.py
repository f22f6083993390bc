"""ControlService: on a private socket, by its own client, and nowhere else unless exposed."""

import asyncio
import json
import os
import socket
import stat
import tempfile
from functools import partial

import grpc
import pytest
from fake_coordinator import PARTITION, stats
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_rig import Rig, Start

from semipd_jax.errors import ConfigError, InvalidRequestError, StartupError, UnavailableError
from semipd_jax.messages import (
    Choice,
    Percentiles,
    PredictionError,
    RecentRequests,
    SetPartition,
    SetSlo,
    Slo,
    SloCounts,
)
from semipd_server import control, control_client
from semipd_server.auth import REFUSAL, Keys
from semipd_server.control import ControlServer
from semipd_server.control_client import ControlClient
from semipd_server.control_convert import stats_message
from semipd_server.gate import Gate
from semipd_server.pb import control_pb2 as pb
from semipd_server.pb import control_pb2_grpc as pb_grpc
from semipd_server.settings import Settings


async def call(rig: Rig, method: str, *, at: str | None = None, key=None, **fields):
    """What a method of the blocking client returns (the first one, of a stream), in a thread, while
    the fake coordinator answers."""

    def run():
        with ControlClient(at or rig.control, api_key=key) as client:
            result = getattr(client, method)(**fields)
            return next(result) if method == "watch" else result

    task = asyncio.ensure_future(asyncio.to_thread(run))
    await rig.fake.until(task.done)
    return task.result()


def test_partition_and_promises_are_read_and_changed(start: Start):
    async def main():
        async with start() as rig:
            partition = await call(rig, "partition")
            assert (partition.policy, partition.decode.asked) == ("static", 1.0)
            assert list(partition.prefill.warm) == [0.5, 1.0]
            assert not partition.HasField("choice")
            await call(rig, "set_partition", prefill_share=0.5)
            await call(rig, "set_partition", policy="predictive")
            await call(rig, "set_slo", ttft_ms=300, tpot_ms=50, priority=2, target=0.95)
            await call(rig, "set_slo", priority=2, remove=True)
            asked, shared, policy, promised, removed = rig.fake.changes
            assert asked == SetPartition(asked.query_id)
            assert shared == SetPartition(shared.query_id, 0.5, None, None)
            assert policy == SetPartition(policy.query_id, None, None, "predictive")
            assert promised == SetSlo(promised.query_id, Slo(300.0, 50.0, 2), 0.95)
            assert removed == SetSlo(removed.query_id, Slo(None, None, 2), remove=True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "fields", "named"),
    [
        ("set_partition", {"prefill_share": 0.0}, "prefill_share is 0.0"),
        ("set_partition", {"decode_share": 1.5}, "decode_share is 1.5"),
        ("set_partition", {"decode_share": float("nan")}, "decode_share is nan"),
        ("set_partition", {"policy": "best"}, "policy is 'best'; allowed: static, semi-pd"),
        (
            "set_partition",
            {"policy": "predictive", "decode_share": 0.5},
            "policy is 'predictive'; allowed: static",
        ),
        ("set_slo", {"ttft_ms": -1.0}, "ttft_ms is -1.0"),
        ("set_slo", {"tpot_ms": float("inf")}, "tpot_ms is inf"),
        ("set_slo", {"target": 1.0}, "target is 1.0"),
        ("set_slo", {"remove": True}, "remove is True"),
        ("set_slo", {"remove": True, "priority": 1, "ttft_ms": 9.0}, "remove is True"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(start: Start, method, fields, named):
    async def main():
        async with start() as rig:
            with pytest.raises(InvalidRequestError, match=named):
                await call(rig, method, **fields)
            assert rig.fake.changes == []

    asyncio.run(main())


def test_what_the_engine_cannot_do_is_refused_with_its_reason(start: Start):
    async def main():
        async with start(cannot="it needs a tuner_profile") as rig:
            with pytest.raises(InvalidRequestError, match="it needs a tuner_profile"):
                await call(rig, "set_partition", policy="predictive")

    asyncio.run(main())


def test_a_watch_streams_statistics_until_the_server_ends(start: Start):
    async def main():
        async with start() as rig, grpc.aio.insecure_channel(rig.control) as channel:
            watch = pb_grpc.ControlServiceStub(channel).WatchPartition(
                pb.WatchPartitionRequest(interval_ms=100)
            )
            serving = asyncio.ensure_future(rig.fake.serve())
            for _ in range(3):
                response = await watch.read()
                assert response.stats.pages.free == 100
                assert response.stats.partition.policy == "static"
            await rig.front_end.drain(600)  # nobody waits for a watch
            assert (await watch.read()).stats.partition.policy == "static"
            rig.engine.connection_lost(UnavailableError("the server is shutting down"))
            rest = asyncio.ensure_future(_drain(watch))
            assert await rest is grpc.StatusCode.UNAVAILABLE
            serving.cancel()

    asyncio.run(main())


async def _drain(call) -> grpc.StatusCode:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return await call.code()


def test_an_interval_out_of_range_is_refused(start: Start):
    async def main():
        async with start() as rig:
            assert (await call(rig, "watch", interval_ms=100)).pages.free == 100
            with pytest.raises(InvalidRequestError, match="interval_ms is 99; allowed: 100 to"):
                await call(rig, "watch", interval_ms=99)

    asyncio.run(main())


def test_all_statistics_reach_the_client():
    choice = Choice(0.5, "decode", 1.0, 0.4, "just enough", 0.02, 0.03, {"budget_s": 0.045})
    shown = stats_message(
        stats(
            partition=type(PARTITION)(
                "predictive",
                PARTITION.prefill,
                PARTITION.decode,
                (Slo(300.0, 50.0), Slo(None, 20.0, 3)),
                0.9,
                choice,
            ),
            num_free_pages=60,
            num_idle_cached_pages=25,
            num_quarantined_pages=5,
            slo=SloCounts(10, 7, 9, 8),
            recent=RecentRequests(60.0, 10, 7, Percentiles(0.1, 0.2, 0.3), None),
            decode_error=PredictionError(4, 0.2),
            num_decode_restarts=3,
        )
    )
    pages = shown.pages
    assert (pages.used, pages.cached, pages.free, pages.quarantined) == (35, 25, 35, 5)
    assert (shown.slo.ended, shown.slo.met, shown.slo.ttft_met, shown.slo.tpot_met) == (10, 7, 9, 8)
    assert shown.recent.ttft_s.p90 == 0.2
    assert not shown.recent.HasField("tpot_s")
    assert shown.decode.prediction_error_mean == pytest.approx(0.05)
    assert (shown.decode.restarts, shown.prefill.restarts) == (3, 0)
    assert shown.partition.choice.inputs == {"budget_s": 0.045}
    assert shown.partition.choice.decode_share == 0.4
    assert not shown.partition.slos[0].HasField("priority")
    assert (shown.partition.slos[1].tpot_ms, shown.partition.slos[1].priority) == (20.0, 3)


# ------------------------------------------------------------ who may


def test_the_socket_is_its_owners_alone(start: Start):
    async def main():
        async with start() as rig:
            mode = os.stat(rig.control.removeprefix("unix:")).st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600

    asyncio.run(main())


def test_control_is_not_on_the_public_port(start: Start):
    async def main():
        async with start() as rig:
            stub = pb_grpc.ControlServiceStub(rig.channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetPartition(pb.GetPartitionRequest())
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert control.SERVICE not in await services(rig.channel)

    asyncio.run(main())


def test_exposed_control_takes_a_key(start: Start):
    async def main():
        settings = Settings(port=0, expose_control=True, api_keys=("secret",))
        async with start(settings=settings) as rig:
            for target in (rig.address, rig.control):
                with pytest.raises(grpc.RpcError, match=REFUSAL.split(";")[0]):
                    await call(rig, "partition", at=target)
                partition = await call(rig, "partition", at=target, key="secret")
                assert partition.policy == "static"

    asyncio.run(main())


def test_control_is_exposed_to_nobody_without_a_secret():
    with pytest.raises(ConfigError, match="expose_control is True"):
        Settings(expose_control=True)


async def services(channel: grpc.aio.Channel) -> list[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for response in stub.ServerReflectionInfo(iter([request])):
        return [service.name for service in response.list_services_response.service]
    raise AssertionError("no answer")


# ------------------------------------------------------------ where


def test_a_socket_in_use_is_not_taken_and_one_left_behind_is(start: Start, tmp_path):
    path = str(tmp_path / "control.sock")
    settings = partial(Settings, port=0, control_socket=path)

    async def main():
        async with start(settings=settings()):
            with pytest.raises(StartupError, match="another server does"):
                await ControlServer(Gate(), Keys(()), path).start()
        os.close(_left_behind(path))
        server = ControlServer(Gate(), Keys(()), path)
        await server.start()
        await server.stop()

    asyncio.run(main())


def _left_behind(path: str) -> int:
    if os.path.exists(path):
        os.unlink(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    return server.detach()


@pytest.mark.parametrize(
    ("path", "named"), [("file", "it is no socket"), ("x" * 120, "at most 107 bytes")]
)
def test_a_path_that_cannot_be_a_socket_is_refused(tmp_path, path, named):
    (tmp_path / "file").touch()

    async def main():
        with pytest.raises(StartupError, match=named):
            await ControlServer(Gate(), Keys(()), str(tmp_path / path)).start()

    asyncio.run(main())


def test_a_client_finds_the_only_server(tmp_path, monkeypatch):
    """One that was killed left its socket behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def bind(name: str) -> socket.socket:
        (tmp_path / f"semipd-engine-{name}").mkdir()
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(tmp_path / f"semipd-engine-{name}" / "control.sock"))
        return bound

    with bind("killed"), bind("a") as a, bind("b") as b:
        with pytest.raises(UnavailableError, match="0 servers"):
            control_client.the_only_socket()
        a.listen()
        assert control_client.the_only_socket() == tmp_path / "semipd-engine-a" / "control.sock"
        b.listen()
        with pytest.raises(UnavailableError, match="2 servers"):
            control_client.the_only_socket()


def test_the_command_shows_and_changes(start: Start, capsys):
    async def command(rig: Rig, *words: str) -> int:
        task = asyncio.ensure_future(
            asyncio.to_thread(control_client.main, ["--server", rig.control, *words])
        )
        await rig.fake.until(task.done)
        return task.result()

    async def main():
        async with start() as rig:
            assert await command(rig, "get") == 0
            shown = json.loads(capsys.readouterr().out)
            assert shown["policy"] == "static"
            assert shown["decode"]["warm"] == [0.5, 1.0]
            assert await command(rig, "slo", "--ttft-ms", "300", "--target", "0.95") == 0
            assert await command(rig, "set", "--policy", "predictive") == 0
            assert await command(rig, "slo", "--priority", "5", "--remove") == 0
            slo, policy, removed = rig.fake.changes[1:]
            assert (slo.slo, slo.target) == (Slo(300.0, None, None), 0.95)
            assert policy.policy == "predictive"
            assert (removed.slo, removed.remove) == (Slo(priority=5), True)
            assert await command(rig, "set", "--decode-share", "2") == 1
            assert "decode_share is 2.0; allowed" in capsys.readouterr().err

    asyncio.run(main())
