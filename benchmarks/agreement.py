"""Is the simulator right? Goodput on servers, beside what profiles of the same machine predict.

    python -m benchmarks.agreement --model DIR --kv-tokens 32768 --slo-ttft-ms 2500 \\
        --slo-tpot-ms 100 --max-num-seqs 16 --out FILE.json -- --max-num-seqs 16

The speed of a shared machine moves within minutes, so every search on a server has a profile from
right before it and one from right after. Both are simulated with the same requests, and what is
compared is the mean. Flags that are not listed are those of `benchmarks.goodput`, for servers and
simulations alike; flags after -- are for all servers and profiles. Nothing else may run meanwhile.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import common
from benchmarks.goodput import __main__ as goodput
from benchmarks.goodput.results import host_ms
from semipd_jax import profile


@dataclass(frozen=True, slots=True)
class Pair:
    """One search on a server, and simulated.

    Attributes:
      measured: goodput in requests/s.
      host_ms: CPU time beside the steps, per token.
      simulated: goodput with the profile from before and the one from after.
      trials: (rate, attainment) that were measured.
    """

    system: str
    seed: int
    measured: float
    host_ms: float | None
    simulated: tuple[float, float]
    trials: tuple[tuple[float, float], ...]


class Machine:
    """
    Args:
      load: flags of `benchmarks.goodput`.
      server: flags of servers and of `semipd_jax.profile`.
      kv_tokens: size of the servers' pool.
    """

    def __init__(
        self, model: str, load: Sequence[str], server: Sequence[str], kv_tokens: int, folder: Path
    ) -> None:
        self._model = model
        self._load = [*load, "--repeat", "1", "--no-plots"]
        self._server = list(server)
        self._kv_tokens = str(kv_tokens)
        self._folder = folder
        self._num_profiles = 0

    def profile(self, share_ladder: str) -> Path:
        path = self._folder / f"profile-{self._num_profiles}.json"
        self._num_profiles += 1
        flags = ["--share-ladder", share_ladder, *self._server]
        _run(profile.main, ["--model", self._model, "--output", str(path), *flags])
        return path

    def measure(self, system: str, seed: int) -> Path:
        return self._search(system, seed, ["--model", self._model], ["--", *self._server])

    def simulate(self, system: str, seed: int, profile: Path, measured: Path) -> Path:
        device = ["--profile", str(profile), "--kv-tokens", self._kv_tokens]
        return self._search(system, seed, [*device, "--against", str(measured)], [])

    def _search(self, system: str, seed: int, first: list[str], last: list[str]) -> Path:
        out = Path(tempfile.mkdtemp(dir=self._folder))
        of_search = ["--systems", system, "--seed", str(seed), "--out", str(out)]
        _run(goodput.main, [*self._load, *first, *of_search, *last])
        return out / "goodput.json"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, load = _parser().parse_known_args(words[:end])
    seeds, systems = range(args.seed, args.seed + args.repeat), list[str](args.systems)
    load += ["--share-ladder", args.share_ladder]
    with tempfile.TemporaryDirectory(prefix="agreement-") as name:
        machine = Machine(args.model, load, words[end + 1 :], args.kv_tokens, Path(name))
        profiles = [machine.profile(args.share_ladder)]
        pairs: list[Pair] = []
        for seed, system in product(seeds, systems):
            measured = machine.measure(system, seed)
            profiles.append(machine.profile(args.share_ladder))
            simulated = [machine.simulate(system, seed, p, measured) for p in profiles[-2:]]
            pairs.append(_pair(system, seed, measured, simulated))
            print(_line(pairs[-1]), file=sys.stderr, flush=True)
        made = [json.loads(path.read_text()) for path in profiles]
    result = common.header(vars(args) | {"flags": words})
    runs = [asdict(pair) for pair in pairs]
    common.write_json(args.out, result | {"pairs": runs, "profiles": made})
    print_agreement(pairs)
    return 0


def print_agreement(pairs: Sequence[Pair]) -> None:
    """For each system and seed, then for each system the means over its seeds."""
    rows = [[p.system, p.seed, p.measured, *p.simulated, _difference([p])] for p in pairs]
    for system in dict.fromkeys(p.system for p in pairs):
        of = [p for p in pairs if p.system == system]
        sides = [mean(p.simulated[side] for p in of) for side in (0, 1)]
        rows.append([system, "mean", mean(p.measured for p in of), *sides, _difference(of)])
    header = ["system", "seed", "measured", "from before", "from after", "mean of both"]
    common.print_table(header, rows)


def _difference(pairs: Sequence[Pair]) -> str:
    measured = mean(p.measured for p in pairs)
    return f"{mean(mean(p.simulated) for p in pairs) / measured - 1:+.0%}" if measured else "-"


def _pair(system: str, seed: int, measured: Path, simulated: Sequence[Path]) -> Pair:
    found = _found(measured, system)
    before, after = (_found(path, system)["goodput"] for path in simulated)
    (search,) = found["seeds"]
    trials = tuple((trial["rate"], trial["attainment"]) for trial in search["trials"])
    return Pair(system, seed, search["goodput"], host_ms(found), (before, after), trials)


def _found(path: Path, system: str) -> dict[str, Any]:
    (load,) = json.loads(path.read_text())["loads"]
    return load["systems"][system]


def _line(pair: Pair) -> str:
    before, after = pair.simulated
    text = f"{pair.system}, seed {pair.seed}: measured {pair.measured:.2f}/s, simulated"
    return f"{text} {before:.2f} and {after:.2f}, {_difference([pair])}"


def _run(program: Any, words: list[str]) -> None:
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
    add("--model", required=True, help="directory of a model")
    add("--kv-tokens", type=int, required=True, help="size of the pool, as the server prints it")
    add("--systems", type=str.split, default=["chunked", "colocated", "static:0.5,0.5+spf"])
    add("--share-ladder", default="0.5,1.0", help="of the profiles [0.5,1.0]")
    add("--seed", type=int, default=0, help="the first one [0]")
    add("--repeat", type=int, default=3, help="seeds [3]")
    add("--out", type=Path, required=True, help="file for all that was found")
    return parser


if __name__ == "__main__":
    sys.exit(main())
