"""`python -m semipd_jax.serve`: a model behind gRPC, from one command."""

import argparse
import logging
import queue
import signal
import sys
import threading
import time
from importlib.metadata import version
from typing import Any, Final, Literal

from setproctitle import setproctitle

from semipd_jax import logs, options
from semipd_jax.config import EngineConfig
from semipd_jax.demo import MODEL_DIR
from semipd_jax.errors import ConfigError, EngineError
from semipd_jax.launch.launcher import FrontEnd, Launcher
from semipd_jax.messages import MemoryLayout, Progress
from semipd_jax.options import Option
from semipd_server.settings import Settings, add_flags, take_flags

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

_log = logging.getLogger("semipd_jax.serve")  # __name__ is __main__


def main(argv: list[str] | None = None) -> int:
    """Serves until a signal comes. Returns the exit status: 0 after an orderly end, 1 after a
    failure, 2 for a bad command line."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    if args.pop("trust_remote_code"):
        parser.error(
            "--trust-remote-code: the engine has its own model definitions and never runs code "
            "that comes with a model"
        )
    try:
        settings = take_flags(args)
        config = options.build_config(**args)
    except ConfigError as error:
        print(f"semipd_jax.serve: error: {error}", file=sys.stderr)
        return 2
    setproctitle("semipd: serve")
    logs.configure("serve", config.log_level)
    if settings.is_exposed:
        _log.warning("no --api-key: whoever reaches %s may use the engine", settings.host)
    return _serve(config, settings)


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
    threading.Thread(target=_start, args=(launcher, config, events), daemon=True).start()
    event = events.get()
    if event == "started":
        _log.info("control socket: unix:%s", settings.control_path(launcher.run_dir))
        event = events.get()
    if event == "signal":
        _drain(launcher, events)
        launcher.stop()
    elif launcher.error is None:
        return 1  # the thread that failed has said why
    if launcher.error is not None:
        _log.error("%s", launcher.error)
        return 1
    _log.info("stopped")
    return 0


def _start(launcher: Launcher, config: EngineConfig, events: "queue.SimpleQueue[_Event]") -> None:
    started_s = time.monotonic()
    try:
        layout = launcher.start()
    except BaseException as error:
        events.put("ended")
        if isinstance(error, EngineError):
            return
        raise
    _announce(launcher, config, layout, time.monotonic() - started_s)
    events.put("started")


def _drain(launcher: Launcher, events: "queue.SimpleQueue[_Event]") -> None:
    """Lets running requests finish; a second signal ends everything now."""
    _log.info("stopping: running requests may finish; a second signal ends them")
    draining = threading.Thread(target=launcher.drain, daemon=True)
    draining.start()
    while draining.is_alive():
        draining.join(0.1)
        if not events.empty() and events.get() == "signal":
            launcher.kill()
            return


def _announce(
    launcher: Launcher, config: EngineConfig, layout: MemoryLayout, seconds: float
) -> None:
    """Says where and how to send a first request, whatever the log level."""
    tokens = (layout.num_pages - 1) * layout.page_size
    most = tokens / layout.max_model_len
    http = f"\nOpenAI API: {launcher.http_address}/v1" if launcher.http_address else ""
    print(
        f"KV cache: {tokens:,} tokens; room for {most:.1f} requests of {layout.max_model_len:,}\n"
        f"{config.model.name} is served at {launcher.address} after {seconds:.1f} s; try:\n"
        f'  python -m semipd_server.client --target {launcher.address} "def main():"{http}',
        file=sys.stderr,
        flush=True,
    )


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m semipd_jax.serve",
        description="Serve a model; prefill and decode share one copy of everything.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("semipd-jax"))
    parser.add_argument("--model", default=str(MODEL_DIR), help="model directory")
    add_flags(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    groups = {section: parser.add_argument_group(title) for section, title in _GROUPS.items()}
    for option in options.OPTIONS:
        groups[option.section].add_argument(_flag(option), **_argument(option))
    return parser


def _flag(option: Option) -> str:
    return "--" + option.name.replace("_", "-")


def _argument(option: Option) -> dict[str, Any]:
    default = "info" if option.name == "log_level" else options.default(option)
    shown = argparse.SUPPRESS if default is None else default
    if options.value_type(option) is bool:
        return {"action": argparse.BooleanOptionalAction, "default": shown, "help": option.help}
    return {
        "type": options.parse(option),
        "choices": options.choices(option),
        "default": shown,
        "help": option.help,
    }


if __name__ == "__main__":
    sys.exit(main())
