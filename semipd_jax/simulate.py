"""`semipd-jax simulate` or `python -m semipd_jax.simulate`: a load at one rate through policies
and baselines, on a virtual clock. `benchmarks.goodput` finds the highest rate that each bears."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from semipd_jax.errors import ConfigError
from semipd_jax.simulator import flags, report
from semipd_jax.simulator.systems import parse, run_at

_SYSTEMS: Final = "colocated chunked static:1,1 semi-pd predictive predictive+spf"


def main(
    arguments: Sequence[str] | None = None, *, prog: str = "python -m semipd_jax.simulate"
) -> int:
    """Returns the exit status: 0, or 2 for a bad command line."""
    args = _parser(prog).parse_args(arguments)
    try:
        result = _simulate(args)
    except (ConfigError, ValueError, OSError) as error:
        print(f"semipd_jax.simulate: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _simulate(args: argparse.Namespace) -> dict[str, Any]:
    args = flags.completed(args)
    systems = [parse(name) for name in args.systems]
    workload = flags.workload_of(args, args.workload, args.seed)
    setup = flags.setup_of(args, workload)
    rate = args.rate if args.rate is not None else workload.rate
    head = report.simulated(setup.platform, workload, setup.targets) | {"rate_per_device": rate}
    rows: dict[str, Any] = {}
    took_s: dict[str, float] = {}
    for system in systems:
        started = time.perf_counter()
        rows[system.name] = report.summary(run_at(system, setup, workload, rate), setup.targets)
        took_s[system.name] = round(time.perf_counter() - started, 1)
        text = f"{system.name}: simulated in {took_s[system.name]} s"
        print(text, file=sys.stderr, flush=True)
    print(report.heading(head))
    print(f"{rate:.2f} requests/s and device\n")
    cells = [report.run_row(name, row) for name, row in rows.items()]
    print(report.table(report.RUN_COLUMNS, cells))
    return head | {"systems": rows, "simulated_in_s": took_s}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--systems", type=str.split, default=_SYSTEMS, help=f"between spaces [{_SYSTEMS}]"
    )
    parser.add_argument("--workload", default="sharegpt", help=f"{flags.load_names()} [sharegpt]")
    parser.add_argument("--rate", type=float, help="requests/s and device [a trace's own]")
    parser.add_argument("--json", type=Path, help="where results go, too")
    flags.add_load(parser)
    flags.add_platform(parser)
    flags.add_engine(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
