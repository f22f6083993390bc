"""`python -m benchmarks.front_end_cost`: what counters, metrics and keys cost, in tokens/s.

Three engines with workers that answer at once take turns. The front end of the first counts nothing
and lets everyone in (`benchmarks.uncounted`); the second one's counts, as all others do; the third
one's wants a key on every call, too, and its metrics are read every second. Each run is compared
with the first engine's of the same turn. Exits with 1 if the third carries less than 90 % of it.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import common
from benchmarks.control_plane import repeat
from benchmarks.fake_engine import fake_engine
from semipd_server.settings import Settings

_KEY: Final = "benchmark"
_LEAST_RATIO: Final = 0.9


@dataclass(frozen=True, slots=True)
class _Variant:
    module: str
    settings: Settings
    api_key: str | None = None


_BARE: Final = "uncounted"
_VARIANTS: Final = {
    _BARE: _Variant("benchmarks.uncounted", Settings(port=0)),
    "counted": _Variant("semipd_server.main", Settings(port=0)),
    "with a key, metrics read": _Variant(
        "semipd_server.main", Settings(port=0, http_port=0, api_keys=(_KEY,)), _KEY
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    result = common.header(vars(args))
    rates = _measure(args.streams, args.output_len, args.repeat)
    ratios = {
        name: [rate / bare for rate, bare in zip(rates[name], rates[_BARE], strict=True)]
        for name in rates
    }
    rows = [(name, *common.spread(rates[name]), *common.spread(ratios[name])) for name in rates]
    columns = ("", "tokens/s min", "median", "max", f"of {_BARE}: min", "median", "max")
    common.print_table(columns, rows)
    if args.json:
        common.write_json(args.json, result | {"tokens_per_s": rates, "ratios": ratios})
    *_, guarded = ratios.values()
    return 0 if median(guarded) >= _LEAST_RATIO else 1


def _measure(streams: int, output_len: int, turns: int) -> dict[str, list[float]]:
    """Tokens/s by variant, one of each turn. Who begins a turn changes."""
    rates: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(fake_engine(streams, v.settings, front_end=v.module))
            for name, v in _VARIANTS.items()
        }
        names = list(_VARIANTS)
        for turn in range(turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                key = _VARIANTS[name].api_key
                work = repeat(engines[name], 1, streams=streams, output_len=output_len, api_key=key)
                [run] = asyncio.run(work)
                rates[name].append(run.tokens_per_s)
    return rates


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.front_end_cost",
        description="Measure what counters, metrics and keys cost.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--streams", type=int, default=64, help="requests at the same time")
    parser.add_argument("--output-len", type=int, default=1024, help="tokens of each stream")
    parser.add_argument("--repeat", type=int, default=15, help="turns")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
