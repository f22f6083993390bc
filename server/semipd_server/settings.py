"""How the front end listens and whom it lets in: chosen on the command line, checked before
anything starts, and told to the front end's process alone."""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shlex
import ssl
from collections.abc import Mapping, MutableMapping
from math import inf
from typing import Any, Final, Self

import msgspec

from semipd_jax.client.bounds import Bounds
from semipd_jax.config import require
from semipd_jax.errors import ConfigError
from semipd_jax.request import MAX_PRIORITY

KEY_VARIABLE: Final = "SEMIPD_API_KEY"
DEFAULT_HTTP_PORT: Final = 8000
CONTROL_SOCKET: Final = "control.sock"
_OFF: Final = "off"
_EXTRA: Final = "openai"
_HTTP_PACKAGES: Final = ("starlette", "uvicorn", "prometheus_client")
_OTEL_PACKAGE: Final = "opentelemetry-exporter-otlp-proto-http"
_FIELD: Final = "settings"  # of a child's `extra`


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raises ConfigError for a value that is not allowed.

    Attributes:
      port: of gRPC; 0 takes a free one.
      http_port: of the OpenAI routes, /health and /metrics; 0 takes a free one, None means none.
      api_keys: what clients must present; empty lets everyone in.
      ssl_keyfile, ssl_certfile: PEM files of the server's key and certificate chain.
      ssl_ca_certs: PEM file of the authorities that clients' certificates must come from.
      min_priority: the most important one that clients may ask for.
      request_timeout: seconds that a request may take from its submission to its end.
      metrics_prefix: what names of metrics begin with, before a colon.
      otlp_traces_endpoint: URL that spans are sent to; None sends none.
      control_socket: path of ControlService's socket; None puts it into the engine's private
        directory.
      expose_control: serve ControlService on the gRPC port too.
      reflection: tell gRPC tools what services there are.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int | None = None
    api_keys: tuple[str, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    min_priority: int = 0
    request_timeout: float = 3600.0
    metrics_prefix: str = "semipd"
    otlp_traces_endpoint: str | None = None
    control_socket: str | None = None
    expose_control: bool = False
    reflection: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.port < 2**16, "port", self.port, "0 to 65535")
        require(
            self.http_port is None or 0 <= self.http_port < 2**16,
            "http_port",
            self.http_port,
            f"0 to 65535, or {_OFF}",
        )
        require(
            self.http_port is None or http_is_installed(),
            "http_port",
            self.http_port,
            f"{_OFF}, unless semipd-jax[{_EXTRA}] is installed",
        )
        require(
            abs(self.min_priority) <= MAX_PRIORITY,
            "min_priority",
            self.min_priority,
            f"-{MAX_PRIORITY} to {MAX_PRIORITY}",
        )
        timeout_s = self.request_timeout
        require(0 < timeout_s < inf, "request_timeout", timeout_s, "a positive number of seconds")
        prefix = self.metrics_prefix
        require(
            re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", prefix) is not None,
            "metrics_prefix",
            prefix,
            "letters, digits and underscores, no digit first",
        )
        endpoint = self.otlp_traces_endpoint
        require(
            endpoint is None or re.fullmatch(r"https?://\S+", endpoint) is not None,
            "otlp_traces_endpoint",
            endpoint,
            "an http:// or https:// URL",
        )
        require(
            endpoint is None or otel_is_installed(),
            "otlp_traces_endpoint",
            endpoint,
            "unset, unless semipd-jax[otel] is installed",
        )
        for key in self.api_keys:
            if not re.fullmatch("[!-~]+", key):
                raise ConfigError("an api_key is not allowed; allowed: printable ASCII, no spaces")
        self._check_certificates()
        if self.expose_control and not self.api_keys and self.ssl_ca_certs is None:
            raise ConfigError(
                "expose_control is True; allowed: False, without api_key or ssl_ca_certs"
            )

    def _check_certificates(self) -> None:
        pair = (self.ssl_keyfile, self.ssl_certfile)
        if (None in pair) and (any(pair) or self.ssl_ca_certs):
            raise ConfigError("ssl_keyfile and ssl_certfile are needed, both, for TLS")
        if None not in pair:
            self.ssl_context()

    def ssl_context(self) -> ssl.SSLContext:
        """For TLS, with client certificates where `ssl_ca_certs` is set."""
        assert self.ssl_certfile is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password=no_password)
            if self.ssl_ca_certs is not None:
                context.load_verify_locations(self.ssl_ca_certs)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            paths = (self.ssl_keyfile, self.ssl_certfile, self.ssl_ca_certs)
            files = ", ".join(filter(None, paths))
            raise ConfigError(f"cannot use the certificates {files}: {error}") from error
        return context

    @property
    def uses_tls(self) -> bool:
        return self.ssl_certfile is not None

    @property
    def client_flags(self) -> str:
        """What our own commands need to trust this server, and to be trusted."""
        if self.ssl_certfile is None:
            return ""
        flags = f" --ssl-ca-certs {shlex.quote(self.ssl_certfile)}"
        mine = " --ssl-certfile YOUR_CERTIFICATE --ssl-keyfile YOUR_KEY"
        return flags if self.ssl_ca_certs is None else flags + mine

    @property
    def is_exposed(self) -> bool:
        """Whether others than this machine's users can connect, without a key or a certificate."""
        return not self.is_local and not self.api_keys and self.ssl_ca_certs is None

    @property
    def is_local(self) -> bool:
        """Whether only this machine's users can connect."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.min_priority, self.request_timeout)

    def control_path(self, run_dir: str) -> str:
        """Of ControlService's socket."""
        return self.control_socket or f"{run_dir}/{CONTROL_SOCKET}"

    def __repr__(self) -> str:
        shown = (f for f in self.__struct_fields__ if f != "api_keys")
        fields = (f"{name}={getattr(self, name)!r}" for name in shown)
        return f"Settings({', '.join(fields)}, {len(self.api_keys)} API keys)"

    def to_extra(self) -> dict[str, str]:
        """As a `ChildSpec` carries it."""
        return {_FIELD: msgspec.json.encode(self).decode()}

    @classmethod
    def from_extra(cls, extra: Mapping[str, str]) -> Self:
        return msgspec.json.decode(extra[_FIELD], type=cls)


def http_is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in _HTTP_PACKAGES)


def otel_is_installed() -> bool:
    return any(importlib.metadata.distributions(name=_OTEL_PACKAGE))


def vllm_is_installed() -> bool:
    """Whether vLLM's gRPC contract can be served beside ours."""
    return importlib.util.find_spec("smg_grpc_proto") is not None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `Settings`, as a group of their own. Those that are not given leave no trace."""
    http_port = DEFAULT_HTTP_PORT if http_is_installed() else _OFF
    group = parser.add_argument_group("serving")

    def add(flag: str, text: str, **options: Any) -> None:
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)

    add("--host", "address to listen on [127.0.0.1]")
    add("--port", "gRPC port; 0 takes a free one [50051]", type=int)
    add(
        "--http-port",
        "port of the OpenAI API, /health, /metrics and /dashboard; 0 takes a free one, "
        f"{_OFF}: none [{http_port}]",
        type=_http_port,
    )
    add(
        "--api-key",
        f"key that clients must present; may be repeated [${KEY_VARIABLE}]",
        dest="api_keys",
        action="append",
        metavar="KEY",
    )
    add("--ssl-keyfile", "PEM file of the server's key: use TLS", metavar="FILE")
    add("--ssl-certfile", "PEM file of the server's certificates", metavar="FILE")
    add(
        "--ssl-ca-certs",
        "PEM file of authorities: clients must have a certificate of theirs",
        metavar="FILE",
    )
    add(
        "--control-socket",
        "path of the Unix socket of ControlService [in the engine's private directory]",
        metavar="PATH",
    )
    add(
        "--expose-control",
        "serve ControlService on the gRPC port too: who may connect may change the engine",
        action="store_true",
    )
    add(
        "--min-priority",
        "most important priority that clients may ask for; lower numbers are more important [0]",
        type=int,
        metavar="N",
    )
    add(
        "--request-timeout",
        "seconds that a request may take, time in the queue included [3600]",
        type=float,
        metavar="S",
    )
    add(
        "--reflection",
        "tell gRPC tools what services there are [True]",
        action=argparse.BooleanOptionalAction,
    )
    add("--metrics-prefix", "beginning of metrics' names [semipd]", metavar="NAME")
    add("--otlp-traces-endpoint", "OpenTelemetry collector that gets spans", metavar="URL")


def take_flags(
    args: dict[str, Any], environment: MutableMapping[str, str] = os.environ
) -> Settings:
    """Takes the flags of `add_flags` out of `args`, and the key out of the environment, which child
    processes inherit.

    Raises:
      ConfigError: a value is not allowed.
    """
    given = {name: args.pop(name) for name in Settings.__struct_fields__ if name in args}
    key = environment.pop(KEY_VARIABLE, None)
    if key == "":
        raise ConfigError(f"${KEY_VARIABLE} is empty; allowed: a key, or no such variable")
    if key is not None:
        given.setdefault("api_keys", [key])
    given["api_keys"] = tuple(given.get("api_keys", ()))
    given.setdefault("http_port", DEFAULT_HTTP_PORT if http_is_installed() else None)
    return Settings(**given)


def _http_port(text: str) -> int | None:
    if text == _OFF:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: 0 to 65535, or {_OFF}") from error


def no_password() -> str:
    """For `SSLContext.load_cert_chain`: nobody is asked for one."""
    raise ValueError("the key is encrypted; use one without a passphrase")
