"""A typed client, blocking and asynchronous. Events and errors are the engine's own.

    with Client("localhost:50051") as client:
        print(client.complete("def main():", max_tokens=20))
        for event in client.generate([{"role": "user", "content": "Hi"}], temperature=0.0):
            print(event)

`python -m semipd_server.client "def main():"` prints a completion as it comes.
"""

import argparse
import json
import os
import sys
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing
from typing import Any, Final, Self

import grpc

from semipd_jax.client import Prompt
from semipd_jax.errors import EngineError
from semipd_jax.request import Delta, Event, validate_scheduling
from semipd_server.convert import event_from, prompt_fields, sampling_message
from semipd_server.pb import inference_pb2 as pb
from semipd_server.pb import inference_pb2_grpc as pb_grpc
from semipd_server.settings import KEY_VARIABLE
from semipd_server.status import error_from, in_a_line
from semipd_server.tls import Tls, add_tls_flags

KEEPALIVE: Final = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
)
"""Options of a channel: a call ends with UNAVAILABLE soon after the server's host is gone."""
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
_RETRIES: Final = 2
_MAX_RETRIES: Final = 4  # gRPC's
_UNARY_TIMEOUT_S: Final = 60.0


class Client:
    """Blocking; may be shared by threads.

    Args:
      api_key: one that the server accepts.
      credentials: for TLS; see `grpc.ssl_channel_credentials`.
      retries: of a call that the server could not take (UNAVAILABLE: nothing was generated), 0 to
        4. A call that was answered in part is never repeated, nor an abort: what may have happened
        once would not be found again.

    Every method raises the `semipd_jax.errors` that the server meant, TimeoutError after
    `timeout_s`, and grpc.RpcError for anything else.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retries: int = _RETRIES,
    ) -> None:
        self._metadata = _metadata(api_key)
        options = _options(retries)
        self._channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._stub: Any = pb_grpc.InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Generator[Event]:
        """Yields Started, Deltas, Finished. Closing the generator ends the request.

        Args:
          prompt: text, token ids, or chat messages ({"role": …, "content": …}).
          priority: lower ones are prefilled first and preempted last.
          cache_salt: cached KV is reused only among requests with the same salt.
          sampling: fields of `request.SamplingParams`; absent ones are the model's defaults.
        """
        call = self._stub.Generate(
            _request(prompt, request_id, priority, cache_salt, sampling),
            timeout=timeout_s,
            metadata=self._metadata,
        )
        try:
            for response in call:
                yield event_from(response)
        except grpc.RpcError as error:
            raise error_from(error) from error
        finally:
            call.cancel()

    def complete(self, prompt: Prompt, **options: Any) -> str:
        """The text of `generate`, with the same options."""
        return "".join(e.text for e in self.generate(prompt, **options) if isinstance(e, Delta))

    def abort(self, request_id: str) -> None:
        """Ends a running request; its stream ends with reason ABORT."""
        self._call(self._stub.Abort, pb.AbortRequest(request_id=request_id))

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text or chat messages."""
        request = pb.TokenizeRequest(**prompt_fields(prompt), add_special_tokens=add_special_tokens)
        return list(self._call(self._stub.Tokenize, request).ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        request = pb.DetokenizeRequest(ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._call(self._stub.Detokenize, request).text

    def model_info(self) -> pb.GetModelInfoResponse:
        return self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest())

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_UNARY_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from(error) from error


class AsyncClient:
    """`Client` on an event loop."""

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retries: int = _RETRIES,
    ) -> None:
        self._metadata = _metadata(api_key)
        options = _options(retries)
        self._channel = (
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        self._stub: Any = pb_grpc.InferenceServiceStub(self._channel)

    async def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[Event]:
        """See `Client.generate`."""
        call = self._stub.Generate(
            _request(prompt, request_id, priority, cache_salt, sampling),
            timeout=timeout_s,
            metadata=self._metadata,
        )
        try:
            async for response in call:
                yield event_from(response)
        except grpc.RpcError as error:
            raise error_from(error) from error
        finally:
            call.cancel()

    async def complete(self, prompt: Prompt, **options: Any) -> str:
        """The text of `generate`, with the same options."""
        async with aclosing(self.generate(prompt, **options)) as events:
            return "".join([e.text async for e in events if isinstance(e, Delta)])

    async def abort(self, request_id: str) -> None:
        """Ends a running request; its stream ends with reason ABORT."""
        await self._call(self._stub.Abort, pb.AbortRequest(request_id=request_id))

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text or chat messages."""
        request = pb.TokenizeRequest(**prompt_fields(prompt), add_special_tokens=add_special_tokens)
        return list((await self._call(self._stub.Tokenize, request)).ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        request = pb.DetokenizeRequest(ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._call(self._stub.Detokenize, request)).text

    async def model_info(self) -> pb.GetModelInfoResponse:
        return await self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest())

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=_UNARY_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from(error) from error


def _options(retries: int) -> tuple[tuple[str, Any], ...]:
    """Of a channel. gRPC itself repeats a call, and only until the server's first word."""
    if not 0 <= retries <= _MAX_RETRIES:
        raise ValueError(f"retries is {retries}; allowed: 0 to {_MAX_RETRIES}")
    all_methods: dict[str, Any] = {"name": [{"service": _SERVICE}]}
    abort = {"name": [{"service": _SERVICE, "method": "Abort"}]}
    if retries:
        all_methods["retryPolicy"] = {
            "maxAttempts": retries + 1,
            "initialBackoff": "0.2s",
            "maxBackoff": "2s",
            "backoffMultiplier": 3,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
    return (
        ("grpc.max_receive_message_length", -1),
        *KEEPALIVE,
        ("grpc.service_config", json.dumps({"methodConfig": [all_methods, abort]})),
    )


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def _request(
    prompt: Prompt, request_id: str, priority: int, cache_salt: str, sampling: dict[str, Any]
) -> pb.GenerateRequest:
    validate_scheduling(priority=priority, cache_salt=cache_salt)
    return pb.GenerateRequest(
        request_id=request_id,
        sampling=sampling_message(sampling),
        priority=priority,
        cache_salt=cache_salt,
        **prompt_fields(prompt),
    )


def main(
    argv: Sequence[str] | None = None, *, prog: str = "python -m semipd_server.client"
) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"Print a completion as it comes. The API key is taken from ${KEY_VARIABLE}.",
    )
    parser.add_argument("prompt")
    parser.add_argument("--target", default="127.0.0.1:50051", help="address of the server")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    add_tls_flags(parser)
    args = vars(parser.parse_args(argv))
    target, prompt, tls = args.pop("target"), args.pop("prompt"), Tls.take(args)
    api_key = os.environ.get(KEY_VARIABLE)
    try:
        with Client(target, api_key=api_key, credentials=tls.channel_credentials()) as client:
            for event in client.generate(prompt, **args):
                if isinstance(event, Delta):
                    print(event.text, end="", flush=True)
    except (EngineError, TimeoutError, grpc.RpcError) as error:
        sys.exit(f"error: {in_a_line(error)}")
    print()


if __name__ == "__main__":
    main()
