"""A blocking client of semipd.v1.ControlService.

    with ControlClient() as control:
        control.set_slo(ttft_ms=300, tpot_ms=50)
        control.set_partition(policy="predictive")
        for stats in control.watch():
            print(stats)

`semipd-jax control` does the same in a terminal.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Final, Self

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from semipd_jax import run_dir
from semipd_jax.config import POLICIES
from semipd_jax.errors import EngineError, UnavailableError
from semipd_server.client import KEEPALIVE
from semipd_server.pb import control_pb2 as pb
from semipd_server.pb import control_pb2_grpc as pb_grpc
from semipd_server.settings import CONTROL_SOCKET, KEY_VARIABLE
from semipd_server.sockets import has_listener
from semipd_server.status import error_from, in_a_line
from semipd_server.tls import Tls, add_tls_flags

_TIMEOUT_S: Final = 15.0
_METHODS: Final = {"get": "partition", "set": "set_partition", "slo": "set_slo"}


class ControlClient:
    """May be shared by threads.

    Args:
      target: `unix:` and the path of a server's control socket, or a public address that control
        is exposed on; None takes the socket of this user's only server.
      api_key: one that the server accepts.
      credentials: for TLS; see `grpc.ssl_channel_credentials`.

    Every method raises the `semipd_jax.errors` that the server meant, TimeoutError if it does not
    answer, and grpc.RpcError for anything else.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        target = target or f"unix:{the_only_socket()}"
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        options = () if target.startswith("unix:") else KEEPALIVE
        self._channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._stub: Any = pb_grpc.ControlServiceStub(self._channel)

    def partition(self) -> pb.Partition:
        return self._call(self._stub.GetPartition, pb.GetPartitionRequest()).partition

    def set_partition(
        self,
        *,
        prefill_share: float | None = None,
        decode_share: float | None = None,
        policy: str | None = None,
    ) -> pb.Partition:
        """A share makes the policy "static" until a policy is set again."""
        request = pb.SetPartitionRequest(
            prefill_share=prefill_share, decode_share=decode_share, policy=policy
        )
        return self._call(self._stub.SetPartition, request).partition

    def set_slo(
        self,
        *,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        priority: int | None = None,
        target: float | None = None,
        remove: bool = False,
    ) -> pb.Partition:
        """Takes the place of what was promised to the same requests; None promises nothing. A
        `target` of None stays as it is. `remove` takes a priority's own promise away."""
        slo = pb.Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms, priority=priority)
        request = pb.SetSloRequest(slo=slo, target=target, remove=remove)
        return self._call(self._stub.SetSlo, request).partition

    def watch(self, *, interval_ms: int = 1000) -> Generator[pb.Stats]:
        """Yields statistics until it is closed. A server whose host is gone is unavailable after a
        minute or so."""
        call = self._stub.WatchPartition(
            pb.WatchPartitionRequest(interval_ms=interval_ms), metadata=self._metadata
        )
        try:
            for response in call:
                yield response.stats
        except grpc.RpcError as error:
            raise error_from(error) from error
        finally:
            call.cancel()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from(error) from error


def the_only_socket() -> Path:
    """The control socket of this user's running server.

    Raises:
      UnavailableError: there is none, or more than one.
    """
    found = [
        path
        for path in (directory / CONTROL_SOCKET for directory in run_dir.of_this_user())
        if has_listener(str(path))
    ]
    if len(found) != 1:
        raise UnavailableError(
            f"{len(found)} servers of this user have a control socket; name one"
            + "".join(f"\n  unix:{path}" for path in found)
        )
    return found[0]


def main(argv: Sequence[str] | None = None, *, prog: str = "semipd-jax control") -> int:
    """Prints JSON. Returns the exit status."""
    args = vars(_parser(prog).parse_args(argv))
    command, server, tls = args.pop("command"), args.pop("server"), Tls.take(args)
    api_key = os.environ.get(KEY_VARIABLE)
    try:
        credentials = tls.channel_credentials()
        with ControlClient(server, api_key=api_key, credentials=credentials) as client:
            if command == "watch":
                with contextlib.suppress(KeyboardInterrupt):
                    for stats in client.watch(**args):
                        _print(stats, indent=None)
            else:
                _print(getattr(client, _METHODS[command])(**args), indent=2)
    except (EngineError, TimeoutError, grpc.RpcError) as error:
        print(f"{prog}: error: {in_a_line(error)}", file=sys.stderr)
        return 1
    return 0


def _print(message: Message, indent: int | None) -> None:
    text = json_format.MessageToJson(message, preserving_proto_field_name=True, indent=indent)
    print(text, flush=True)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show or change how a running server divides its compute, and what it "
        f"promises. The API key is taken from ${KEY_VARIABLE}.",
    )
    parser.add_argument(
        "--server",
        help="address of its control socket (unix:PATH), or HOST:PORT that control is exposed on "
        "[this user's only server]",
    )
    add_tls_flags(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("get", help="shares, policy, promises and the latest decision")
    change = commands.add_parser("set", help="shares, which make the policy static, or a policy")
    change.add_argument("--prefill-share", type=float)
    change.add_argument("--decode-share", type=float)
    change.add_argument("--policy", choices=POLICIES)
    slo = commands.add_parser("slo", help="what is promised, in place of what was")
    slo.add_argument("--ttft-ms", type=float, help="[nothing]")
    slo.add_argument("--tpot-ms", type=float, help="[nothing]")
    slo.add_argument("--priority", type=int, help="of requests with this priority [the others]")
    slo.add_argument("--target", type=float, help="share of requests that should meet both")
    slo.add_argument(
        "--remove",
        action="store_true",
        help="take the priority's own promise away: what the others are promised holds again",
    )
    watch = commands.add_parser("watch", help="statistics, one line of JSON each time")
    watch.add_argument("--interval-ms", type=int, default=1000)
    return parser


if __name__ == "__main__":
    sys.exit(main())
