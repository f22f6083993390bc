"""`semipd-jax serve` or `python -m semipd_jax.serve`: a model behind gRPC and HTTP, from one
command. Flags may also come from a file (`--config`); those of the command line win."""

import argparse
import logging
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from setproctitle import setproctitle

from semipd_jax import logs, options
from semipd_jax.config import EngineConfig
from semipd_jax.config_file import FlagKind, read_words
from semipd_jax.demo import MODEL_DIR
from semipd_jax.errors import ConfigError, EngineError, StartupError
from semipd_jax.launch import waits
from semipd_jax.launch.launcher import FrontEnd, Launcher
from semipd_jax.messages import MemoryLayout, Progress
from semipd_jax.models.registry import load_spec
from semipd_jax.options import Option
from semipd_jax.runtime.cache_dir import cache_root
from semipd_jax.text.tokenizer import require_tokenizer
from semipd_server.settings import Settings, add_flags, take_flags
from semipd_server.sockets import require_free

type _Event = Literal["started", "ended", "signal"]

_PROGRESS_EVERY_S: Final = 2.0
_GROUPS: Final = {
    "model": "model",
    "cache": "KV cache",
    "scheduler": "scheduling",
    "shares": "compute shares",
    "tuner": "SLO tuner",
    "timeouts": "timeouts",
    "": "other",
}

_DEFAULTS: Final = {"model": str(MODEL_DIR), "log_level": "info"}
"""Where they differ from the library's."""

_METAVARS: Final = {int: "N", float: "X", str: "TEXT", tuple: "X,..."}

_log = logging.getLogger("semipd_jax.serve")  # __name__ is __main__


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m semipd_jax.serve") -> int:
    """Serves until a signal comes. Returns the exit status: 0 after an orderly end, 1 after a
    failure, 2 for a bad command line or config file."""
    parser = _parser(prog)
    try:
        args = _take_arguments(parser, argv)
        if args.pop("trust_remote_code", False):
            raise ConfigError(
                "--trust-remote-code: the engine has its own model definitions and never runs "
                "code that comes with a model"
            )
        settings = take_flags(args)
        config = options.build_config(**args)
        _check_early(config, settings)
    except (ConfigError, StartupError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    setproctitle("semipd: serve")
    logs.configure("serve", config.log_level, config.log_format)
    if settings.is_exposed:
        _log.warning("no --api-key: whoever reaches %s may use the engine", settings.host)
    return _serve(config, settings)


def _check_early(config: EngineConfig, settings: Settings) -> None:
    """Finds what processes would find when they have begun to start, as far as it is cheap.

    Raises:
      ConfigError, StartupError: what they would raise.
    """
    load_spec(config.model.path).max_len(config.model.max_model_len)
    require_tokenizer(config.model.tokenizer_path)
    cache_root(config.compile_cache_dir)
    if settings.control_socket is not None:
        require_free(settings.control_socket)


def _serve(config: EngineConfig, settings: Settings) -> int:
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: events.put("signal"))
    launcher = Launcher(
        config,
        front_end=FrontEnd(module="semipd_server.main", extra=settings.to_extra()),
        on_progress=_ProgressLog(),
        on_failure=lambda _: events.put("ended"),
    )
    threading.Thread(target=_start, args=(launcher, config, settings, events), daemon=True).start()
    event = waits.take(events)
    if event == "started":
        _log.info("control socket: unix:%s", settings.control_path(launcher.run_dir))
        event = waits.take(events)
    if event == "signal":
        _end(launcher, events)
    elif launcher.error is None:
        return 1  # the thread that failed has said why
    if launcher.error is not None:
        _log.error("%s", launcher.error)
        return 2 if isinstance(launcher.error, ConfigError) else 1
    _log.info("stopped")
    return 0


def _start(
    launcher: Launcher,
    config: EngineConfig,
    settings: Settings,
    events: "queue.SimpleQueue[_Event]",
) -> None:
    started_s = time.monotonic()
    try:
        layout = launcher.start()
    except BaseException as error:
        events.put("ended")
        if isinstance(error, EngineError):
            return
        raise
    _announce(launcher, config, settings, layout, time.monotonic() - started_s)
    events.put("started")


def _end(launcher: Launcher, events: "queue.SimpleQueue[_Event]") -> None:
    """Lets running requests finish, then stops; a second signal ends everything now."""
    _log.info("stopping: running requests may finish; a second signal ends them")

    def drain_and_stop() -> None:
        launcher.drain()
        launcher.stop()

    ending = threading.Thread(target=drain_and_stop, daemon=True)
    ending.start()
    while ending.is_alive():
        ending.join(0.1)
        if not events.empty() and events.get() == "signal":
            launcher.kill()
            return


def _announce(
    launcher: Launcher,
    config: EngineConfig,
    settings: Settings,
    layout: MemoryLayout,
    seconds: float,
) -> None:
    """Says where and how to send a first request; to a person, whatever the log level."""
    tokens = (layout.num_pages - 1) * layout.page_size
    most = tokens / layout.max_model_len
    url = launcher.http_address
    http = f"\nOpenAI API: {url}/v1; live view: {url}/dashboard" if url else ""
    text = (
        f"KV cache: {tokens:,} tokens; room for {most:.1f} requests of {layout.max_model_len:,}\n"
        f"{config.model.name} is served at {launcher.address} after {seconds:.1f} s; try:\n"
        f"  python -m semipd_server.client --target {launcher.address}{settings.client_flags} "
        f'"def main():"{http}'
    )
    if config.log_format == "json":
        _log.info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


class _ProgressLog:
    """Logs a stage's first and last progress, and one in between every now and then."""

    def __init__(self) -> None:
        self._logged_s: dict[tuple[str, str], float] = {}

    def __call__(self, name: str, progress: Progress) -> None:
        now = time.monotonic()
        stage = name, progress.stage
        recent = now - self._logged_s.get(stage, -_PROGRESS_EVERY_S) < _PROGRESS_EVERY_S
        if recent and progress.done < progress.total:
            return
        self._logged_s[stage] = now
        text = progress.detail or f"{progress.done}/{progress.total}"
        _log.info("%s: %s %s", name, progress.stage, text)


def _take_arguments(parser: "_Parser", argv: Sequence[str] | None) -> dict[str, Any]:
    """What the command line says, what else the config file says, and defaults for the rest.

    Raises:
      ConfigError: the config file has something that the command line would not take.
    """
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    return _DEFAULTS | (_from_file(parser, path) if path is not None else {}) | given


def _from_file(parser: "_Parser", path: Path) -> dict[str, Any]:
    words = read_words(path, parser.flags())
    try:
        return vars(parser.parse_args(words))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


class _Parser(argparse.ArgumentParser):
    """Errors are exceptions: what is wrong may be in a file."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def flags(self) -> dict[str, FlagKind]:
        """Names that may be in a file, without dashes in front."""
        kinds: dict[str, FlagKind] = {}
        for action in self._actions:
            if action.dest not in ("help", "version", "config"):
                kinds[action.option_strings[0].removeprefix("--")] = _kind(action)
        return kinds


def _kind(action: argparse.Action) -> FlagKind:
    match action:
        case argparse.BooleanOptionalAction():
            return "switch"
        case argparse._AppendAction():
            return "repeated"
        case argparse.Action(nargs=0):
            return "mark"
    return "value"


def _parser(prog: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--model DIR] [flag ...]",
        description="Serve a model; prefill and decode share one copy of everything.",
        epilog="In brackets: defaults.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"semipd-jax {version('semipd-jax')}"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of these flags, without dashes in front; those given here win",
    )
    parser.add_argument("--model", metavar="DIR", help="model directory [the demo model]")
    parser.add_argument("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    add_flags(parser)
    groups = {section: parser.add_argument_group(title) for section, title in _GROUPS.items()}
    for option in options.OPTIONS:
        groups[option.section].add_argument(_flag(option), **_argument(option))
    return parser


def _flag(option: Option) -> str:
    return "--" + option.name.replace("_", "-")


def _argument(option: Option) -> dict[str, Any]:
    default = _DEFAULTS.get(option.name, options.default(option))
    text = option.help if default is None or default == () else f"{option.help} [{default}]"
    if options.value_type(option) is bool:
        return {
            "action": argparse.BooleanOptionalAction,
            "help": text,
            "default": argparse.SUPPRESS,
        }
    words, kind = options.choices(option), options.value_type(option)
    return {
        "type": options.parse(option),
        "choices": words,
        "metavar": None if words else _METAVARS[kind],
        "help": text,
    }


if __name__ == "__main__":
    sys.exit(main())
