"""The HTTP routes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from semipd_jax.errors import InvalidRequestError
from semipd_server import patience
from semipd_server.auth import Keys
from semipd_server.dashboard import load_dashboard
from semipd_server.gate import Engine, Gate
from semipd_server.live import LiveView
from semipd_server.metrics import Metrics
from semipd_server.openai.answer import Answer
from semipd_server.openai.chat import chat, conversation
from semipd_server.openai.completions import complete
from semipd_server.openai.door import Door
from semipd_server.openai.entries import check_entries
from semipd_server.openai.errors import ApiError, api_error, bad_request
from semipd_server.openai.names import as_sent
from semipd_server.openai.reply import Reply, Work
from semipd_server.openai.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    Model,
    ModelList,
    Sampling,
    TokenizeRequest,
    Tokens,
    parse,
)
from semipd_server.openai.tokens import TokenTexts

_HELD_BYTES: Final = 256 << 20
_HELD_BODIES: Final = 8
"""Of bodies that are being read, all together: at least so many bytes, or longest ones."""
_SMALL_BYTES: Final = 64 << 10
"""A body up to this size is read anyway: connections are bounded, and so is what each buffers."""
_BYTES_PER_BRACKET: Final = 16  # at least, of the longest body

type Handler = Callable[[Request], Awaitable[ASGIApp]]
type Prepare[R] = Callable[[Engine, TokenTexts, R], Awaitable[Answer]]


def build_app(
    gate: Gate, metrics: Metrics, keys: Keys, *, max_body_bytes: int, own_names_only: bool
) -> ASGIApp:
    """All routes, behind the door.

    Args:
      max_body_bytes: longer bodies are refused.
      own_names_only: see `Door`.
    """
    routes = Routes(gate, metrics, max_body_bytes)
    table: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/v1/chat/completions", routes.chat_completions),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{model:path}", routes.model),
        ("POST", "/tokenize", routes.tokenize),
        ("POST", "/detokenize", routes.detokenize),
        ("GET", "/version", routes.version),
        ("GET", "/health", routes.health),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/dashboard", routes.dashboard),
        ("GET", "/dashboard.json", routes.live),
    ]
    app = Starlette(
        routes=[Route(path, _safe(handler), methods=[verb]) for verb, path, handler in table],
        exception_handlers={HTTPException: _refused_by_router},
    )
    return Door(app, gate, keys, own_names_only=own_names_only)


class Routes:
    """The handlers."""

    def __init__(self, gate: Gate, metrics: Metrics, max_body_bytes: int) -> None:
        self._gate = gate
        self._metrics = metrics
        self._live = LiveView(gate)
        self._dashboard = load_dashboard()
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max(_HELD_BYTES, _HELD_BODIES * max_body_bytes)
        self._num_held_bytes = 0  # of bodies that are being read
        self._created = int(time.time())
        self._texts: TokenTexts | None = None

    async def completions(self, request: Request) -> ASGIApp:
        return await self._generate(request, CompletionRequest, complete)

    async def chat_completions(self, request: Request) -> ASGIApp:
        return await self._generate(request, ChatRequest, chat)

    async def models(self, request: Request) -> ASGIApp:
        return _json(ModelList([self._model()]))

    async def model(self, request: Request) -> ASGIApp:
        self._check_model(request.path_params["model"], self._gate.engine)
        return _json(self._model())

    async def tokenize(self, request: Request) -> ASGIApp:
        engine, body = await self._asked(request, TokenizeRequest)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("allowed: either prompt or messages, and not both", "prompt")
        prompt = body.prompt if body.messages is None else conversation(body.messages)
        special = body.add_special_tokens
        ids = await engine.client.encode(prompt or "", add_special_tokens=special)
        strings = None
        if body.return_token_strs:
            strings = await asyncio.to_thread(self._token_texts(engine).texts_of, ids)
        return _json(Tokens(len(ids), engine.info.max_model_len, list(ids), strings))

    async def detokenize(self, request: Request) -> ASGIApp:
        engine, body = await self._asked(request, DetokenizeRequest)
        client = engine.client
        vocab_size = client.layout.vocab_size
        for token_id in body.tokens:
            if not 0 <= token_id < vocab_size:
                raise bad_request(
                    f"tokens has {token_id}; allowed: 0 to {vocab_size - 1}", "tokens"
                )
        return _json(Detokenized(await client.decode(body.tokens, skip_special_tokens=False)))

    async def version(self, request: Request) -> ASGIApp:
        return _json({"version": version("semipd-jax")})

    async def health(self, request: Request) -> ASGIApp:
        problem = await self._gate.problem()
        if problem is None:
            return _json({"status": "ok"})
        return _json({"status": "unavailable", "reason": problem}, 503)

    async def metrics(self, request: Request) -> ASGIApp:
        body, content_type = await self._metrics.render(request.headers.get("accept", ""))
        return Response(body, media_type=content_type)

    async def dashboard(self, request: Request) -> ASGIApp:
        """The page only: what it shows, it asks `/dashboard.json` for, with the key."""
        page, headers = self._dashboard
        return Response(page, headers=headers, media_type="text/html")

    async def live(self, request: Request) -> ASGIApp:
        return _json(await self._live.look())

    # ------------------------------------------------------------ what they share

    async def _generate[R: Sampling](
        self, request: Request, kind: type[R], prepare: Prepare[R]
    ) -> ASGIApp:
        engine, body = await self._asked(request, kind)

        async def work(reply: Reply) -> None:
            try:
                answer = await prepare(engine, self._token_texts(engine), body)
                if body.stream:
                    await answer.send_stream(reply, body.stream_options)
                else:
                    await answer.send_whole(reply)
            except InvalidRequestError as error:
                raise as_sent(error, body) from error

        return Work(work)

    async def _asked[T: Body](self, request: Request, kind: type[T]) -> tuple[Engine, T]:
        """What the request asks, and whom."""
        body = await self._read(request, kind)
        engine = self._engine_for(body.model)
        check_entries(body, engine.info.max_model_len)
        return engine, body

    async def _read[T: Body](self, request: Request, kind: type[T]) -> T:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # what a web page may send unasked is none
            raise ApiError(415, f"content-type is {media_type!r:.80}; allowed: 'application/json'")
        body = bytearray()
        try:
            async with asyncio.timeout(patience.BODY_S):
                async for piece in request.stream():
                    self._num_held_bytes += len(piece)
                    body += piece
                    if len(body) > self._max_body_bytes:
                        limit = self._max_body_bytes
                        raise ApiError(413, f"the body is too long; allowed: {limit} bytes")
                    is_small = len(body) <= _SMALL_BYTES
                    if not is_small and self._num_held_bytes > self._max_held_bytes:
                        raise ApiError(429, "too many bodies are being read; try again")
        except TimeoutError as error:
            raise ApiError(408, f"the body took longer than {patience.BODY_S:.0f} s") from error
        finally:
            self._num_held_bytes -= len(body)
        return parse(bytes(body), kind, max_brackets=self._max_body_bytes // _BYTES_PER_BRACKET)

    def _engine_for(self, model: str) -> Engine:
        engine = self._gate.admit()
        self._check_model(model, engine)
        return engine

    def _check_model(self, model: str, engine: Engine) -> None:
        if model not in ("", engine.info.name):
            raise ApiError(
                404,
                f"the model {model!r:.200} does not exist; allowed: {engine.info.name!r}",
                param="model",
                code="model_not_found",
            )

    def _model(self) -> Model:
        info = self._gate.engine.info
        return Model(info.name, self._created, info.max_model_len)

    def _token_texts(self, engine: Engine) -> TokenTexts:
        if self._texts is None:
            self._texts = TokenTexts(engine.client.tokenizer)
        return self._texts


def _safe(handler: Handler) -> Handler:
    """Every error is an answer."""

    async def call(request: Request) -> ASGIApp:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response()  # to nobody
        except Exception as error:
            return _error_response(api_error(error))

    return call


async def _refused_by_router(request: Request, error: Exception) -> Response:
    return _error_response(api_error(error))


def _error_response(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body, error.status, headers)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
