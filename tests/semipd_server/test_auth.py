"""Who gets in: keys on every call but health, TLS, client certificates."""

import asyncio
import itertools
import shlex
import socket
import ssl
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx2
import openai
import pytest
from certificates import Authority
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from msgspec import structs
from openai_rig import openai_client, request, while_serving
from server_rig import Rig, Start
from starlette.routing import Route

from semipd_jax.errors import DuplicateRequestError, RequestNotFoundError
from semipd_server import cli
from semipd_server.auth import Keys
from semipd_server.client import AsyncClient
from semipd_server.pb import inference_pb2 as pb
from semipd_server.settings import KEY_VARIABLE, Settings

KEYS = ("first-key", "second-key")
LOCKED = Settings(port=0, http_port=0, api_keys=KEYS)
BAD = [
    None,
    "",
    "first-key",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    "Basic first-key",
    "Bearer first-key2",
]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "authority")


@pytest.mark.parametrize("header", [*BAD, "Bearer \xff", "Bearer \udcff"])
def test_keys_refuse(header: str | None):
    assert Keys(KEYS).holder(header) is None
    assert Keys(()).holder(header) == ""


@pytest.mark.parametrize(
    ("header", "holder"),
    [("Bearer first-key", "0"), ("bearer second-key", "1"), ("Bearer  first-key ", "0")],
)
def test_keys_accept_and_tell_their_holders_apart(header: str, holder: str):
    assert Keys(KEYS).holder(header) == holder


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch):
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert Keys(KEYS).holder("Bearer first-key") is not None
    assert len(compared) == len(KEYS)
    assert {len(side) for pair in compared for side in pair} == {32}


def all_methods(rig: Rig) -> set[str]:
    """Full names of every method that the gRPC server has, as it tells those with a key."""

    def ask() -> set[str]:
        with grpc.insecure_channel(rig.address) as channel:
            database = ProtoReflectionDescriptorDatabase(
                grpc.intercept_channel(channel, _WithKey())
            )
            names: set[str] = set()
            for service in database.get_services():
                file = database.FindFileContainingSymbol(service)
                for found in file.service:
                    if f"{file.package}.{found.name}" == service:
                        names |= {f"/{service}/{method.name}" for method in found.method}
            return names

    return ask()


class _WithKey(grpc.StreamStreamClientInterceptor):
    def intercept_stream_stream(self, continuation, details, requests):
        details = details._replace(metadata=(("authorization", f"Bearer {KEYS[0]}"),))
        return continuation(details, requests)


async def code_of(rig: Rig, method: str, header: str | None) -> grpc.StatusCode | None:
    """The status of a call; None for a health watch, which does not end by itself. The request goes
    out with the call: a client that still sends when the status comes might report a failure of its
    own instead."""
    call = rig.channel.unary_stream(
        method,
        request_serializer=empty_pb2.Empty.SerializeToString,
        response_deserializer=empty_pb2.Empty.FromString,
    )(empty_pb2.Empty(), metadata=_authorization(header).items(), timeout=60)
    with suppress(grpc.aio.AioRpcError):
        if await call.read() is not grpc.aio.EOF and method.endswith("/Watch"):
            call.cancel()
            return None
    return await call.code()


def _authorization(header: str | None) -> dict[str, str]:
    return {} if header is None else {"authorization": header}


def test_no_method_but_health_answers_without_a_key(start: Start):
    async def main():
        async with start(settings=LOCKED) as rig:
            methods = await asyncio.to_thread(all_methods, rig)
            assert len(methods) >= 8
            for header in BAD:
                for method in sorted(methods):
                    code = await code_of(rig, method, header)
                    is_health = method.startswith("/grpc.health.v1.Health/")
                    assert (code is grpc.StatusCode.UNAUTHENTICATED) == (not is_health), method
            health: Any = health_pb2_grpc.HealthStub(rig.channel)
            status = (await health.Check(health_pb2.HealthCheckRequest())).status
            assert status == health_pb2.HealthCheckResponse.SERVING
            assert rig.fake.submitted == []

    asyncio.run(main())


def test_who_has_no_key_is_refused_before_its_message_is_read(start: Start):
    async def main():
        async with start(settings=LOCKED) as rig:
            call = rig.channel.stream_stream("/semipd.v1.InferenceService/Generate")()
            assert await asyncio.wait_for(call.code(), 60) is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


def test_who_has_no_key_is_not_told_how_busy_the_server_is(start: Start):
    async def main():
        async with start(settings=LOCKED, max_calls=1) as rig:
            metadata = _authorization("Bearer first-key").items()
            running = rig.stub.Generate(pb.GenerateRequest(text="Hi"), metadata=metadata)
            await rig.fake.until(lambda: len(rig.fake.submitted) == 1, stepping=False)
            method = "/semipd.v1.InferenceService/GetModelInfo"
            full = grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await code_of(rig, method, "Bearer second-key") is full
            assert await code_of(rig, method, None) is grpc.StatusCode.UNAUTHENTICATED
            running.cancel()

    asyncio.run(main())


def test_requests_of_another_key_can_neither_be_ended_nor_found(start: Start):
    async def main():
        async with (
            start(settings=LOCKED) as rig,
            AsyncClient(rig.address, api_key=KEYS[0]) as first,
            AsyncClient(rig.address, api_key=KEYS[1]) as second,
        ):
            mine = asyncio.ensure_future(first.complete("Hi", max_tokens=2, request_id="x"))
            await rig.fake.until(lambda: len(rig.fake.submitted) == 1, stepping=False)
            with pytest.raises(RequestNotFoundError):
                await second.abort("x")
            theirs = asyncio.ensure_future(second.complete("Hi", max_tokens=2, request_id="x"))
            await rig.fake.until(lambda: len(rig.fake.submitted) == 2, stepping=False)
            with pytest.raises(DuplicateRequestError):
                await asyncio.wait_for(first.complete("Hi", request_id="x"), 30)
            await second.abort("x")
            await rig.fake.until(theirs.done, stepping=False)
            assert len(rig.fake.aborted) == 1
            await rig.fake.until(mine.done)
            assert mine.result()

    asyncio.run(main())


def routes_of(rig: Rig) -> list[Route]:
    app = rig.front_end._http._server.config.app._app  # pyright: ignore
    return list(app.routes)


def test_no_route_but_health_answers_without_a_key(start: Start):
    async def main():
        async with start(settings=LOCKED) as rig:
            paths = {route.path for route in routes_of(rig)} | {"/nowhere", "/health/", "//health"}
            assert len(paths) >= 11
            headers = [_authorization(h) for h in BAD if h is None or h == h.strip()]
            async with httpx2.AsyncClient(base_url=rig.url, timeout=60) as client:
                for path, verb, header in itertools.product(paths, ("GET", "POST"), headers):
                    ask = client.request(verb, path, headers=header, json={})
                    reply = await while_serving(rig, ask)
                    if path in ("/health", "/dashboard"):  # the latter is a page without data
                        assert reply.status_code == (200 if verb == "GET" else 405)
                    else:
                        assert reply.status_code == 401, path
                        assert reply.headers["www-authenticate"] == "Bearer"
                        assert reply.json()["error"]["code"] == "invalid_api_key"

    asyncio.run(main())


def test_clients_with_a_key_get_in(start: Start):
    async def main():
        async with start(settings=LOCKED) as rig:
            for key in KEYS:
                async with AsyncClient(rig.address, api_key=key) as client:
                    assert await while_serving(rig, client.complete("Hi", max_tokens=1))
                async with openai_client(rig, key) as http:
                    create = http.completions.create(model="tiny", prompt="Hi", max_tokens=1)
                    assert (await while_serving(rig, create)).choices
            async with openai_client(rig, "wrong") as http:
                with pytest.raises(openai.AuthenticationError):
                    await http.models.list()

    asyncio.run(main())


def test_keys_are_shown_nowhere(start: Start, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")

    async def main():
        async with start(settings=LOCKED) as rig:
            async with AsyncClient(rig.address, api_key=KEYS[0]) as client:
                await while_serving(rig, client.complete("Hi", max_tokens=1))
            headers = {"authorization": f"Bearer {KEYS[0]}"}
            for path in ("/metrics", "/v1/models", "/nowhere"):
                reply = await request(rig, "GET", path, headers=headers)
                assert KEYS[0] not in reply.text

    asyncio.run(main())
    assert not any(key in caplog.text for key in KEYS)
    assert not any(key in repr(LOCKED) for key in KEYS)
    assert "2 API keys" in repr(LOCKED)


# ---------------------------------------------------------------- TLS


def tls(authority: Authority, *, clients: bool, **fields: Any) -> Settings:
    key, certificate = authority.issue("server")
    return Settings(
        **fields,
        port=0,
        http_port=0,
        ssl_keyfile=key,
        ssl_certfile=certificate,
        ssl_ca_certs=authority.ca if clients else None,
    )


async def over_both(rig: Rig, ca: str, pair: tuple[str, str] | None) -> tuple[bool, bool]:
    """Whether gRPC and HTTP serve a client that trusts `ca` and has this key and certificate."""
    key, certificate = (Path(f).read_bytes() for f in pair) if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, certificate)
    context = ssl.create_default_context(cafile=ca)
    if pair:
        context.load_cert_chain(pair[1], pair[0])
    found = []
    async with AsyncClient(rig.address, credentials=credentials) as client:
        try:
            found.append((await client.model_info()).name == "tiny")
        except Exception:
            found.append(False)
    async with httpx2.AsyncClient(verify=context, timeout=60) as client:
        try:
            found.append((await client.get(f"{rig.url}/v1/models")).status_code == 200)
        except httpx2.TransportError:
            found.append(False)
    return found[0], found[1]


def test_tls(start: Start, authority: Authority, tmp_path: Path):
    async def main():
        other = Authority(tmp_path, "other")
        async with start(settings=tls(authority, clients=False)) as rig:
            assert rig.url.startswith("https://")
            assert await over_both(rig, authority.ca, None) == (True, True)
            assert await over_both(rig, other.ca, None) == (False, False)
            with pytest.raises(httpx2.TransportError):
                await request(rig, "GET", rig.url.replace("https", "http") + "/health")

    asyncio.run(main())


def test_mutual_tls(start: Start, authority: Authority, tmp_path: Path):
    async def main():
        other = Authority(tmp_path, "other")
        async with start(settings=tls(authority, clients=True)) as rig:
            assert await over_both(rig, authority.ca, authority.issue("client")) == (True, True)
            assert await over_both(rig, authority.ca, None) == (False, False)
            assert await over_both(rig, authority.ca, other.issue("client")) == (False, False)

    asyncio.run(main())


def test_renewed_certificates_meet_whoever_connects_next(start: Start, tmp_path: Path):
    async def main():
        old, new = (Authority(tmp_path, name) for name in ("old", "new"))
        async with start(settings=tls(old, clients=False)) as rig:
            assert await over_both(rig, old.ca, None) == (True, True)
            context = ssl.create_default_context(cafile=old.ca)
            async with httpx2.AsyncClient(verify=context, base_url=rig.url) as client:
                await client.get("/version")
                new.issue("server")
                assert (await client.get("/version")).status_code == 200  # its connection stays
            assert await over_both(rig, new.ca, None) == (True, True)
            assert await over_both(rig, old.ca, None) == (False, False)

    asyncio.run(main())


def test_renewed_authorities_decide_who_gets_in(start: Start, tmp_path: Path):
    async def main():
        old, new = (Authority(tmp_path, name) for name in ("old", "new"))
        served = tls(old, clients=True)
        authorities = tmp_path / "authorities.pem"
        authorities.write_bytes(Path(old.ca).read_bytes())
        async with start(settings=structs.replace(served, ssl_ca_certs=str(authorities))) as rig:
            mine, others = old.issue("mine"), new.issue("others")
            assert await over_both(rig, old.ca, mine) == (True, True)
            assert await over_both(rig, old.ca, others) == (False, False)
            context = ssl.create_default_context(cafile=old.ca)
            context.load_cert_chain(mine[1], mine[0])
            session = await asyncio.to_thread(session_of_a_request, rig.url, context, None)
            again = await asyncio.to_thread(session_of_a_request, rig.url, context, session)
            assert again is not None, "an authority of today's"
            authorities.write_bytes(Path(new.ca).read_bytes())
            assert await over_both(rig, old.ca, others) == (True, True)
            assert await over_both(rig, old.ca, mine) == (False, False)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.to_thread(session_of_a_request, rig.url, context, session)

    asyncio.run(main())


def session_of_a_request(
    url: str, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> ssl.SSLSession | None:
    """Asks over a connection that resumes `session`. Raises OSError if it is not answered."""
    host, port = url.removeprefix("https://").rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=30) as connection,
        context.wrap_socket(connection, server_hostname=host, session=session) as client,
    ):
        client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        if not client.recv(1 << 16).startswith(b"HTTP/1.1 200"):
            raise ConnectionError("no answer")
        return client.session


def test_files_that_are_of_no_use_change_nothing(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async def main():
        old, new = (Authority(tmp_path, name) for name in ("old", "new"))
        settings = tls(old, clients=False)
        key, certificate = Path(settings.ssl_keyfile or ""), Path(settings.ssl_certfile or "")
        async with start(settings=settings) as rig:
            good = certificate.read_bytes()
            new.issue("server")
            certificate.write_bytes(good)  # not of this key
            assert await over_both(rig, old.ca, None) == (True, True)
            key.write_text("nonsense")
            assert await over_both(rig, old.ca, None) == (True, True)
            certificate.unlink()
            assert await over_both(rig, old.ca, None) == (True, True)
            told = [r for r in caplog.records if str(certificate) in r.message]
            assert len(told) == 6, "once of each change, and of each protocol"
            new.issue("server")
            assert await over_both(rig, new.ca, None) == (True, True)

    asyncio.run(main())


async def command(rig: Rig, *words: str) -> int:
    """The status of `semipd-jax WORD ...`, whatever ends it."""

    def run() -> int:
        try:
            return cli.main(words)
        except SystemExit:
            return 1

    return await while_serving(rig, asyncio.to_thread(run))


async def statuses(rig: Rig, *flags: str) -> list[int]:
    """Of every command that speaks to a server, with these flags for TLS."""
    return [
        await command(rig, "complete", "--target", rig.address, "--max-tokens=1", *flags, "Hi"),
        await command(rig, "control", "--server", rig.address, *flags, "get"),
        await command(rig, "top", "--once", "--url", rig.url, *flags),
    ]


@pytest.mark.parametrize("is_mutual", [False, True])
def test_our_own_commands_speak_tls(
    start: Start,
    authority: Authority,
    tmp_path: Path,
    is_mutual: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(KEY_VARIABLE, KEYS[0])
    settings = tls(authority, clients=is_mutual, expose_control=True, api_keys=KEYS)

    async def main():
        key, certificate = authority.issue("client")
        mine = ["--ssl-certfile", certificate, "--ssl-keyfile", key] if is_mutual else []
        async with start(settings=settings) as rig:
            assert await statuses(rig, "--ssl-ca-certs", authority.ca, *mine) == [0, 0, 0]
            told = shlex.split(settings.client_flags)  # trusts the server's own certificate
            assert await statuses(rig, *told[:2], *mine) == [0, 0, 0]
            assert told[2::2] == (["--ssl-certfile", "--ssl-keyfile"] if is_mutual else [])
            assert await statuses(rig) == [1, 1, 1]
            other = Authority(tmp_path, "other").ca
            assert await statuses(rig, "--ssl-ca-certs", other, *mine) == [1, 1, 1]
            if is_mutual:
                assert await statuses(rig, "--ssl-ca-certs", authority.ca) == [1, 1, 1]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--ssl-ca-certs", "/no/file"], "cannot use the certificates /no/file"),
        (["--ssl-certfile", "/no/file"], "ssl_keyfile and ssl_certfile are needed, both"),
    ],
)
@pytest.mark.parametrize("words", [["complete", "Hi"], ["control", "get"], ["top", "--once"]])
def test_files_of_no_use_are_named(
    words: list[str], flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) if words[0] == "complete" else nullcontext() as raised:
        assert cli.main([words[0], *flags, *words[1:]]) == 1
    told = capsys.readouterr()
    text = f"{told.out}{told.err}{raised.value if raised else ''}"
    assert named in " ".join(text.split())
