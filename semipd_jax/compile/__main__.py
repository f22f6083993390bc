"""`python -m semipd_jax.compile`: fills the compile cache, so that the first start is quick.

    python -m semipd_jax.compile --model DIR --share-ladder 0.6,0.8,1.0
    python -m semipd_jax.compile --model DIR --share-ladder 0.6,0.8,1.0 --gpu h100

On the machine that will serve, with the flags that it will serve with: every worker of the ladder
starts on its own share and compiles its programs. The second form needs no GPU: it compiles the
same programs for one that is described, and says what that cannot replace.
"""

import argparse
import sys
import threading
from collections.abc import Sequence

from tqdm import tqdm

from semipd_jax import options
from semipd_jax.compile import described, here
from semipd_jax.config import EngineConfig, require
from semipd_jax.demo import MODEL_DIR
from semipd_jax.errors import ConfigError, EngineError
from semipd_jax.messages import Progress
from semipd_jax.models.registry import load_spec


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m semipd_jax.compile") -> int:
    """Returns the exit status: 0 if every program is compiled, 2 for a bad command line."""
    args = vars(_parser(prog).parse_args(argv))
    gpu, jobs = args.pop("gpu", None), args.pop("jobs")
    try:
        require(jobs >= 1, "jobs", jobs, "1 or more")
        config = options.build_config(args.pop("model"), **args)
        load_spec(config.model.path)
        return _here(config) if gpu is None else _described(config, gpu, jobs)
    except (ConfigError, EngineError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _here(config: EngineConfig) -> int:
    with _Bar() as bar:
        workers = here.fill(config, bar.show)
    for worker in workers:
        print(f"{worker.name}: {worker.num_cached} of {worker.num_programs} programs were there")
    return 0


def _described(config: EngineConfig, gpu: described.Gpu, jobs: int) -> int:
    with _Bar() as bar:
        programs = described.compile_all(config, gpu, jobs=jobs, show=bar.show)
    for program in programs:
        print(program)
    failed = sum(program.problem is not None for program in programs)
    print(f"\n{len(programs) - failed} of {len(programs)} programs compile for {gpu}, not run\n")
    print(described.LIMITS)
    return int(failed > 0)


class _Bar:
    """One bar over the programs of all workers, which report, from several threads, how many they
    have."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: dict[str, Progress] = {}
        # `disable=None`: only if standard error is a terminal.
        self._bar = tqdm(desc="compile", unit="program", total=0, disable=None)

    def show(self, name: str, progress: Progress) -> None:
        if progress.stage != "compile":
            return
        with self._lock:
            self._progress[name] = progress
            self._bar.total = sum(p.total for p in self._progress.values())
            self._bar.n = sum(p.done for p in self._progress.values())
            self._bar.refresh()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compile ahead of the first start. Flags are those of semipd_jax.serve.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="DIR", default=str(MODEL_DIR), help="model directory")
    parser.add_argument("--gpu", choices=described.GPUS, help="compile for this GPU, without one")
    parser.add_argument("--jobs", type=int, default=1, help="with --gpu: programs at once")
    options.add_flags(parser, options.OPTIONS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
