"""One HTTP response: JSON, or events as they happen, for as long as somebody listens."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from semipd_server.openai.errors import ApiError, api_error

_EVENT_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]

_KEEP_ALIVE_S: Final = 15.0


class Reply:
    """What is sent to one client. Errors become a status, or the last event if some were sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_begun = False
        self._sent_s = 0.0

    async def json(self, body: bytes) -> None:
        await self._begin(200, [(b"content-type", b"application/json")])
        await self._body(body, is_last=True)

    async def event(self, data: bytes) -> None:
        await self._piece(b"data: " + data + b"\n\n")

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Inside, comments fill the time between events: proxies and clients give up on a stream
        that is silent while its request waits in the queue."""
        commenting = asyncio.ensure_future(self._comment())
        try:
            yield
        finally:
            commenting.cancel()

    async def _comment(self) -> None:
        loop = asyncio.get_running_loop()
        self._sent_s = loop.time()
        while True:
            await asyncio.sleep(self._sent_s + _KEEP_ALIVE_S - loop.time())
            if loop.time() - self._sent_s >= _KEEP_ALIVE_S:
                await self._piece(b": keep-alive\n\n")

    async def end(self) -> None:
        """After the last event."""
        await self._body(b"data: [DONE]\n\n", is_last=True)

    async def error(self, error: ApiError) -> None:
        if self._is_begun:
            await self.event(error.body)
            await self.end()
        else:
            await self._begin(error.status, error.headers)
            await self._body(error.body, is_last=True)

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._is_begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _piece(self, body: bytes) -> None:
        if not self._is_begun:
            await self._begin(200, _EVENT_HEADERS)
        await self._body(body)

    async def _body(self, body: bytes, *, is_last: bool = False) -> None:
        self._sent_s = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})


class Work:
    """A response that takes time; it is cancelled when the client leaves."""

    def __init__(self, work: Callable[[Reply], Awaitable[None]]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working = asyncio.ensure_future(self._answer(Reply(send)))
        leaving = asyncio.ensure_future(_until_gone(receive))
        tasks: tuple[asyncio.Future[Any], ...] = (working, leaving)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, reply: Reply) -> None:
        try:
            await self._work(reply)
        except Exception as error:
            await reply.error(api_error(error))


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
