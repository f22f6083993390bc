"""`semipd-jax top`: what `/dashboard` shows, in a terminal."""

import argparse
import contextlib
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from semipd_jax.errors import ConfigError
from semipd_server.live import Engine, Latency, Live, Phase
from semipd_server.settings import KEY_VARIABLE
from semipd_server.tls import Tls, add_tls_flags

_TIMEOUT_S: Final = 5.0
_BAR: Final = 24
_SPARKS: Final = " ▁▂▃▄▅▆▇█"
_FAINT: Final = "bright_black"
_COLOURS: Final = {"used": "blue", "quarantined": "yellow", "cached": "green", "free": _FAINT}


def main(argv: Sequence[str] | None = None, *, prog: str = "semipd-jax top") -> int:
    """Shows a server until Ctrl-C, or once. Returns 1 if `--once` got no answer."""
    args = _parse(argv, prog)
    console = Console()
    try:
        context = Tls.take(vars(args)).ssl_context()
    except ConfigError as error:
        console.print(_page(None, str(error)))
        return 1
    if args.once:
        live, problem = _look(args.url, context)
        console.print(_page(live, problem))
        return 1 if live is None else 0
    with contextlib.suppress(KeyboardInterrupt), Screen(console=console, screen=True) as screen:
        while True:
            screen.update(_page(*_look(args.url, context)), refresh=True)
            time.sleep(args.every)
    return 0


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"Watch a server. The API key is taken from ${KEY_VARIABLE}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's HTTP address")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="look once")
    add_tls_flags(parser)
    return parser.parse_args(argv)


def _look(url: str, context: ssl.SSLContext | None) -> tuple[Live | None, str | None]:
    """What the server says, or why it says nothing."""
    if not url.startswith(("http://", "https://")):
        return None, f"url is {url!r}; allowed: http://… or https://…"
    request = urllib.request.Request(f"{url.rstrip('/')}/dashboard.json")
    if key := os.environ.get(KEY_VARIABLE):
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context) as reply:
            return msgspec.json.decode(reply.read(), type=Live), None
    except urllib.error.HTTPError as error:
        return None, f"set ${KEY_VARIABLE}" if error.code == 401 else f"status {error.code}"
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        return None, f"no answer from {url}: {error}"


# ---------------------------------------------------------------- what is shown


def _page(live: Live | None, problem: str | None) -> RenderableType:
    if live is None:
        return Panel(Text(problem or "", "red"), title="semipd")
    state = Text(live.problem or "serving", "green" if live.problem is None else "red")
    title = Text.assemble("semipd ", live.version, "  ", (live.model or "", "bold"), "  ", state)
    if live.engine is None:
        return Panel(title)
    engine = live.engine
    panels = [
        Panel(_shares(engine), title="compute shares"),
        Panel(_requests(engine), title="requests"),
        Panel(_latency(engine.ttft_ms), title="time to first token"),
        Panel(_latency(engine.tpot_ms), title="time per output token"),
        Panel(_pages(engine), title="KV pages"),
    ]
    return Group(title, Columns(panels), Text(_counts(engine), _FAINT))


def _rows() -> Table:
    table = Table.grid(padding=(0, 1))
    for justify in ("left", "left", "right"):
        table.add_column(justify=justify)
    return table


def _bar(share: float, colour: str, mark: float | None = None) -> Text:
    filled = round(min(max(share, 0.0), 1.0) * _BAR)
    bar = Text("█" * filled, colour) + Text("─" * (_BAR - filled), _FAINT)
    if mark is not None and 0.0 <= mark <= 1.0:
        at = min(round(mark * _BAR), _BAR - 1)
        bar = bar[:at] + Text("│", "bold") + bar[at + 1 :]
    return bar


def _shares(engine: Engine) -> Table:
    table = _rows()

    def add(name: str, phase: Phase, colour: str) -> None:
        share = phase.asked if phase.current is None else phase.current
        table.add_row(name, _bar(share, colour, phase.asked), f"{share:.0%}")

    add("prefill", engine.prefill, "blue")
    add("decode", engine.decode, "green")
    table.add_row("", f"{engine.prefill.switches + engine.decode.switches} switches", "")
    table.add_row("policy", Text(engine.policy), "")
    return table


def _requests(engine: Engine) -> Table:
    table, past = _rows(), engine.history
    found = engine.attainment
    met = "-" if not found.ended else f"{found.met / found.ended:.0%} of {found.ended}"
    table.add_row("running", _spark([p.running for p in past]), f"{engine.running}")
    table.add_row("waiting", _spark([p.waiting for p in past]), f"{engine.waiting}")
    tokens = _spark([p.output_tokens_per_s for p in past])
    table.add_row("tokens/s", tokens, f"{engine.rates['output_tokens']:,.0f}")
    table.add_row("met SLOs", f"target {found.target:.0%}", met)
    return table


def _latency(latency: Latency) -> Table:
    table = _rows()
    values = {"p50": latency.p50, "p90": latency.p90, "p99": latency.p99}
    scale = 1.25 * max([v for v in (*values.values(), latency.slo) if v is not None], default=1.0)
    mark = None if latency.slo is None else latency.slo / scale
    for name, value in values.items():
        is_late = value is not None and latency.slo is not None and value > latency.slo
        bar = _bar((value or 0.0) / scale, "red" if is_late else "green", mark)
        table.add_row(name, bar, _time(value))
    table.add_row("SLO", "", _time(latency.slo))
    return table


def _pages(engine: Engine) -> Table:
    table = _rows()
    total = max(sum(engine.pages.values()), 1)
    for name, count in engine.pages.items():
        table.add_row(name, _bar(count / total, _COLOURS.get(name, "white")), f"{count:,}")
    return table


def _counts(engine: Engine) -> str:
    counts = [f"{name.replace('_', ' ')} {count:,}" for name, count in engine.counts.items()]
    restarts = engine.prefill.restarts + engine.decode.restarts
    hits = "-" if engine.cache_hit_rate is None else f"{engine.cache_hit_rate:.0%}"
    return " · ".join((*counts, f"worker restarts {restarts}", f"prefix cache hits {hits}"))


def _spark(values: Sequence[float]) -> Text:
    shown = values[-_BAR:]
    highest = max([*shown, 1e-9])
    return Text("".join(_SPARKS[round(v / highest * (len(_SPARKS) - 1))] for v in shown), "cyan")


def _time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.1f} ms"
