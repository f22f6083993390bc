"""Goodput: the highest rate at which enough requests meet both targets, for each mode and policy.

    python -m benchmarks.goodput --workload sharegpt --workload conv.csv --out DIR
    python -m benchmarks.goodput --model DIR --slo-ttft-ms 2000 --slo-tpot-ms 150 --out DIR
    python -m benchmarks.goodput --from DIR/goodput.json --from OTHER/goodput.json --out DIR

Systems are simulated; with `--model` each of them is a server that is started with its flags, and
flags after `--` are for all of them. `--from` measures nothing and draws what was found before;
`--against` puts another result's goodput beside this one, as a simulation beside a measurement; a
simulation takes from it what the host took in each system (`--host-ms`).
Every system gets the same requests; repetitions take other ones, after all systems had their turn,
a whole search each. Failed requests are misses.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks import common
from benchmarks.goodput.live import Server, flags_of, limits_of
from benchmarks.goodput.results import host_ms, result_of
from benchmarks.goodput.search import Subject, take_turns
from benchmarks.goodput.simulated import Simulated
from benchmarks.goodput.statics import against_statics
from benchmarks.goodput.tables import OURS, agreement, markdown
from semipd_jax.config import require
from semipd_jax.errors import ConfigError
from semipd_jax.simulator import flags, report
from semipd_jax.simulator.systems import Setup, System, parse
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner.slo import SloTarget, SloTargets

_SIMULATED: Final = (
    "disaggregated colocated chunked static:1,1 static:0.8,1 semi-pd predictive static:1,1+spf "
    "predictive+spf"
)
_LIVE: Final = "colocated chunked static:1,1 semi-pd static:1,1+spf"
_TIMEOUT_S: Final = 600.0
_NOT_OF_A_LOAD: Final = ("workload", "out", "plots", "saved", "model", "server")
"""Settings that say nothing about a load's result, or are told with its heading."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        loads = _merged(args.saved) if args.saved else _measured_all(args)
    except (ConfigError, ValueError, OSError) as error:
        print(f"benchmarks.goodput: {error}", file=sys.stderr)
        return 2
    text = markdown(loads)
    if args.against is not None:
        text += "\n" + agreement(loads, _loads_of(args.against))
    print(text)
    if args.out is not None:
        _write(args.out, loads, text, draws=args.plots)
    return 0


def _completed(args: argparse.Namespace) -> argparse.Namespace:
    """Raises ConfigError for flags that would do nothing."""
    if args.model is None:
        require(not args.server, "flags after --", args.server, "only with --model")
        flags.refuse(args, ["timeout"], "only with --model")
        args = flags.completed(args)
    else:
        flags.refuse(args, ["check_statics", *flags.SIMULATED], "only without --model")
        timeout_s = _TIMEOUT_S if args.timeout is None else args.timeout
        args = argparse.Namespace(**(vars(args) | {"timeout": timeout_s}))
    has_ours = OURS in (args.systems or _SIMULATED.split())
    require(
        not args.check_statics or has_ours, "systems", args.systems, f"{OURS}, to check statics"
    )
    return args


def _flags(args: argparse.Namespace) -> str:
    """Those that say how loads were measured, as far as they are not as usual."""
    usual = vars(_parser().parse_args([]))
    words: list[str] = []
    for name, value in vars(args).items():
        if value != usual[name] and name not in _NOT_OF_A_LOAD:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [_word(value)]
    return shlex.join(words)


def _word(value: Any) -> str:
    match value:
        case Path():
            return value.name
        case tuple():
            return ",".join(map(str, value))
        case list():
            return " ".join(value)
    return str(value)


def _measured_all(given: argparse.Namespace) -> list[dict[str, Any]]:
    args, words = _completed(given), _flags(given)
    return [
        _measured(args, name) | {"run": {"flags": words, **common.header(vars(args))}}
        for name in args.workload or ["sharegpt"]
    ]


def _measured(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Targets that are not given, and what is said about a load, are of the first seed's part."""
    workload = flags.workload_of(args, name, args.seed)
    subjects, targets, result = (_simulated if args.model is None else _live)(args, name, workload)
    found = take_turns(
        subjects,
        targets,
        range(args.seed, args.seed + args.repeat),
        start_rate=args.start_rate,
        least_rate=args.least_rate,
        precision=args.precision,
        progress=lambda text: _progress(f"{workload.name}: {text}"),
    )
    result["systems"] = {name: result_of(each, targets) for name, each in found.items()}
    rates = {one.seed: one.rate for one in found.get(OURS, ())}
    ours = next((subject for subject in subjects if subject.name == OURS), None)
    if args.check_statics and isinstance(ours, Simulated) and all(rates.values()):
        result["statics"] = against_statics(ours, rates)
    return result


type _Ready = tuple[Sequence[Subject], SloTargets, dict[str, Any]]


def _simulated(args: argparse.Namespace, name: str, workload: Workload) -> _Ready:
    setup, measured_ms = flags.setup_of(args, workload), _measured_host_ms(args, workload.name)
    subjects = [
        Simulated(
            parse(system),
            _with_host(setup, measured_ms[system]) if system in measured_ms else setup,
            lambda seed: flags.workload_of(args, name, seed),
        )
        for system in args.systems or _SIMULATED.split()
    ]
    head = report.simulated(setup.platform, workload, setup.targets)
    return subjects, setup.targets, head


def _measured_host_ms(args: argparse.Namespace, load: str) -> dict[str, float]:
    """System → what `--against` tells, unless `--host-ms` is given."""
    if args.against is None or args.host_ms is not None:
        return {}
    loads = [one for one in _loads_of(args.against) if one["workload"] == load]
    times = {name: host_ms(found) for one in loads for name, found in one["systems"].items()}
    return {name: ms for name, ms in times.items() if ms is not None}


def _with_host(setup: Setup, ms: float) -> Setup:
    return replace(setup, platform=replace(setup.platform, host_s=ms / 1e3))


def _live(args: argparse.Namespace, name: str, workload: Workload) -> _Ready:
    target = SloTarget(args.slo_ttft_ms, args.slo_tpot_ms)
    given = (target.ttft_ms, target.tpot_ms)
    require(None not in given, "slo_ttft_ms and slo_tpot_ms", given, "numbers, with --model")
    targets = SloTargets(target, attainment=args.slo_target)
    subjects = [
        Server(
            name=system,
            model=args.model,
            flags=_server_flags(args, parse(system), targets),
            load=lambda seed: flags.workload_of(args, name, seed),
            timeout_s=args.timeout,
        )
        for system in args.systems or _LIVE.split()
    ]
    platform = f"{Path(args.model).name} on {common.cpu_model()}, {os.cpu_count()} cores"
    notes = [f"server flags: {' '.join(args.server)}"] if args.server else []
    head = report.header(workload, targets, origin="measured", platform=platform, notes=notes)
    return subjects, targets, head


def _server_flags(args: argparse.Namespace, system: System, targets: SloTargets) -> list[str]:
    """Flags after -- win."""
    limits = limits_of(
        system,
        chunk_tokens=args.chunk_tokens,
        whole_tokens=args.whole_tokens,
        max_num_seqs=args.max_num_seqs,
        ageing_tokens_per_s=args.ageing_tokens_per_s,
    )
    own = flags_of(system, targets, flags.ladders_of(args), args.profile)
    return [*own, *limits, *args.server]


def _loads_of(path: Path) -> list[dict[str, Any]]:
    """Where a file tells once how all its loads were measured, that is of each of them."""
    result = json.loads(path.read_text())
    of_all = {name: value for name, value in result.items() if name != "loads"}
    return [{"run": of_all} | load for load in result["loads"]]


def _merged(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Loads in the order of the files; later ones of a name win."""
    return list({load["workload"]: load for path in paths for load in _loads_of(path)}.values())


def _write(out: Path, loads: Sequence[dict[str, Any]], text: str, *, draws: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    common.write_json(out / "goodput.json", {"loads": loads})
    (out / "goodput.md").write_text(text)
    if draws:
        from benchmarks.goodput.plots import draw

        for load in loads:
            draw(load, out)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.goodput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--systems", type=str.split, help=f"between spaces [{_SIMULATED}; servers: {_LIVE}]")
    add("--workload", action="append", help=f"{flags.load_names()}; may be repeated")
    add("--repeat", type=int, default=3, help="searches of each system, with a seed each [3]")
    add("--start-rate", type=float, default=4.0, help="requests/s, where the first one starts [4]")
    add("--least-rate", type=float, default=0.1, help="requests/s, below is nothing [0.1]")
    add("--precision", type=float, default=0.02, help="of the rate, relative [0.02]")
    add(
        "--check-statics",
        action="store_true",
        default=None,
        help="look for static shares that do better",
    )
    add("--against", type=Path, help="a goodput.json to compare with")
    add("--out", type=Path, help="folder for goodput.json, goodput.md and plots")
    add("--no-plots", dest="plots", action="store_false", help="do not draw")
    add("--from", dest="saved", type=Path, action="append", help="a goodput.json to draw again")
    live = parser.add_argument_group("servers").add_argument
    live("--model", help="directory of a model: measure servers instead of simulating")
    live("--timeout", type=float, help=f"seconds for any one wait [{_TIMEOUT_S:.0f}]")
    live("server", nargs="*", help="after --: flags for every server")
    flags.add_load(parser)
    flags.add_platform(parser)
    flags.add_engine(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
