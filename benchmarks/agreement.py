"""Is the simulator right? Goodput on servers, beside what profiles of the same machine predict.

    python -m benchmarks.agreement --model DIR --kv-tokens 32768 --slo-ttft-ms 2500 \\
        --slo-tpot-ms 100 --max-num-seqs 16 --out FILE.json -- --max-num-seqs 16
    python -m benchmarks.agreement --from FILE.json --out FILE.json

The speed of a shared machine moves within minutes, so every search on a server has a profile from
right before it and one from right after. Both are simulated with the same requests, and what is
compared is their mean. Flags that are not listed are those of `benchmarks.goodput`, for servers and
simulations alike; flags after -- are for all servers and profiles. Nothing else may run meanwhile.
`--from` measures nothing and simulates again what was measured before.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import count, pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any, Final

from benchmarks import common
from benchmarks.goodput import __main__ as goodput
from benchmarks.goodput.results import host_ms
from semipd_jax import profile
from semipd_jax.config import require
from semipd_jax.errors import ConfigError

_SYSTEMS: Final = "chunked colocated static:0.5,0.5+spf"


@dataclass(frozen=True, slots=True)
class Search:
    """
    Attributes:
      measured: goodput on a server, requests/s.
      host_ms: CPU time beside the steps, per token.
      trials: (rate, attainment) that were measured.
      simulated: goodput with the profile from before and with the one from after.
    """

    system: str
    seed: int
    measured: float
    host_ms: float
    trials: Sequence[Sequence[float]]
    simulated: Sequence[float] = ()

    @property
    def difference(self) -> float:
        """Of the simulations' mean, relative."""
        return mean(self.simulated) / self.measured - 1


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, load = _parser().parse_known_args(words[:end])
    try:
        is_writable = args.out.parent.is_dir() and not args.out.is_dir()
        require(is_writable, "out", str(args.out), "a file in a directory")
        with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
            if args.saved is None:
                require(args.model is not None, "model", None, "a directory, without --from")
                require(args.kv_tokens is not None, "kv_tokens", None, "a number, without --from")
                result = measured(args, load, words[end + 1 :], Path(folder))
            else:
                require(not load, "flags", load, "none but --out, with --from")
                result = json.loads(args.saved.read_text())
            result["searches"] = [asdict(s) for s in simulated(result, Path(folder))]
    except (ConfigError, OSError) as error:
        print(f"benchmarks.agreement: {error}", file=sys.stderr)
        return 2
    common.write_json(args.out, result)
    print_agreement([Search(**s) for s in result["searches"]])
    return 0


def measured(
    args: argparse.Namespace, load: list[str], server: list[str], folder: Path
) -> dict[str, Any]:
    """Searches and profiles by turns, one profile more; written after each of them."""
    ladder = ["--share-ladder", args.share_ladder]
    load = [*load, *ladder, "--repeat", "1", "--no-plots"]
    numbers = count()

    def take_profile() -> Any:
        path = folder / f"profile-{next(numbers)}.json"
        flags = ["--model", args.model, "--output", str(path), *ladder, *server]
        _run(profile.main, flags)
        return json.loads(path.read_text())

    result = common.header(vars(args) | {"server": server})
    result |= {"load": load, "kv_tokens": args.kv_tokens}
    result |= {"searches": [], "profiles": [take_profile()]}
    seeds, systems = range(args.seed, args.seed + args.repeat), list[str](args.systems)
    for seed, system in product(seeds, systems):
        found = _goodput(["--model", args.model], load, system, seed, folder, ["--", *server])
        (search,) = found["seeds"]
        require(search["goodput"] > 0, f"goodput of {system}", 0, "more: loosen the targets")
        trials = [(trial["rate"], trial["attainment"]) for trial in search["trials"]]
        one = Search(system, seed, search["goodput"], host_ms(found) or 0.0, trials)
        result["searches"].append(asdict(one))
        result["profiles"].append(take_profile())
        common.write_json(args.out, result)
        print(f"{system}, seed {seed}: {one.measured:.2f}/s", file=sys.stderr, flush=True)
    return result


def simulated(result: dict[str, Any], folder: Path) -> list[Search]:
    """Every search with the profile from before it and the one from after."""
    paths = [folder / f"{n}.json" for n in range(len(result["profiles"]))]
    for path, made in zip(paths, result["profiles"], strict=True):
        path.write_text(json.dumps(made))
    searches: list[Search] = []
    for values, beside in zip(result["searches"], pairwise(paths), strict=True):
        search = Search(**values)
        device = ["--kv-tokens", str(result["kv_tokens"]), "--host-ms", str(search.host_ms)]
        rates: list[float] = []
        for path in beside:
            flags = ["--profile", str(path), *device]
            found = _goodput(flags, result["load"], search.system, search.seed, folder, [])
            rates.append(found["goodput"])
        searches.append(replace(search, simulated=rates))
    return searches


def print_agreement(searches: Sequence[Search]) -> None:
    """Each search, then for each system the means, and that of differences without their signs."""
    header = ["system", "seed", "measured", "from before", "from after", "mean of both"]
    rows = [[s.system, s.seed, s.measured, *s.simulated, f"{s.difference:+.0%}"] for s in searches]
    common.print_table(header, rows)
    print()
    rows = []
    for system in dict.fromkeys(s.system for s in searches):
        own = [s for s in searches if s.system == system]
        here, there = mean(mean(s.simulated) for s in own), mean(s.measured for s in own)
        apart = mean(abs(s.difference) for s in own)
        rows.append([system, there, here, f"{here / there - 1:+.0%}", f"{apart:.0%}"])
    header = ["system", "measured", "simulated", "difference", "of one search, on average"]
    common.print_table(header, rows)


def _goodput(
    first: list[str], load: list[str], system: str, seed: int, folder: Path, last: list[str]
) -> dict[str, Any]:
    """What `benchmarks.goodput` finds for one system."""
    out = Path(tempfile.mkdtemp(dir=folder))
    of_search = ["--systems", system, "--seed", str(seed), "--out", str(out)]
    _run(goodput.main, [*first, *load, *of_search, *last])
    (found,) = json.loads((out / "goodput.json").read_text())["loads"]
    return found["systems"][system]


def _run(program: Callable[[Sequence[str]], int], words: list[str]) -> None:
    """Without its tables. Ends this program if it fails; why, it has said."""
    with redirect_stdout(io.StringIO()):
        status = program(words)
    if status:
        sys.exit(f"benchmarks.agreement: status {status} of: {' '.join(words)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help="directory of a model")
    add("--kv-tokens", type=int, help="size of the pool, as the server prints it")
    add("--systems", type=str.split, default=_SYSTEMS.split(), help=f"[{_SYSTEMS}]")
    add("--share-ladder", default="0.5,1.0", help="of the profiles [0.5,1.0]")
    add("--seed", type=int, default=0, help="the first one [0]")
    add("--repeat", type=int, default=3, help="seeds [3]")
    add("--from", dest="saved", type=Path, help="file of what was measured before")
    add("--out", type=Path, required=True, help="file for all that was found")
    return parser


if __name__ == "__main__":
    sys.exit(main())
