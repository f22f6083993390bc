"""Runs clients that others wrote, each from an environment of its own, against this server.

    python -m benchmarks.conformance [openai smg aiperf guidellm]

The environments are made when they are first needed. The record is `conformance.json` beside them,
or --json. Exits with 1 if a client failed.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.conformance.clients import CLIENTS, Server
from benchmarks.semipd import running_server
from semipd_jax.demo import MODEL_DIR

_INSTALL_S = 1800


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    header = common.header(vars(args))
    wrong, rows = 0, []
    with _server(args) as server, tempfile.TemporaryDirectory() as scratch:
        for name in args.clients or CLIENTS:
            directory = Path(scratch) / name
            directory.mkdir()
            client = CLIENTS[name]
            try:
                binaries = _environment(args.environments / name, client.packages)
                outcome = client.run(server, binaries, directory)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                wrong, outcome = wrong + 1, f"FAILED: {error}"
            rows.append({"client": name, "packages": client.packages, "outcome": outcome})
            print(f"{name}: {outcome}", file=sys.stderr, flush=True)
    for row in rows:
        print(f"{row['client']} ({', '.join(row['packages'])}): {row['outcome']}")
    record = args.json or args.environments / "conformance.json"
    common.write_json(record, header | {"clients": rows})
    print(f"record: {record}")
    return 1 if wrong else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conformance",
        description="Run clients that others wrote against this server.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("clients", nargs="*", choices=[[], *CLIENTS], help="which ones; none: all")
    parser.add_argument(
        "--environments", type=Path, default=Path(".conformance"), help="where they are installed"
    )
    parser.add_argument("--grpc", help="address of a running server; otherwise one is started")
    parser.add_argument("--http", help="its HTTP address")
    parser.add_argument("--name", help="its model")
    parser.add_argument("--model", default=str(MODEL_DIR), help="directory of the model")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    return parser.parse_args(argv)


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[Server]:
    if args.grpc:
        yield Server(args.grpc, args.http, args.name, args.model)
        return
    flags = ["--max-num-seqs", "8", "--http-port", "18099"]
    with running_server(args.model, flags, timeout_s=600.0) as (target, info):
        yield Server(target, "http://127.0.0.1:18099", info.name, args.model)


def _environment(directory: Path, packages: Sequence[str]) -> Path:
    """The bin directory of a virtual environment with these packages."""
    stamp = directory / "installed"
    wanted = "\n".join(packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True, timeout=120)
        install = [str(directory / "bin" / "pip"), "install", "--quiet", *packages]
        subprocess.run(install, check=True, timeout=_INSTALL_S)
        stamp.write_text(wanted)
    return directory.resolve() / "bin"


if __name__ == "__main__":
    sys.exit(main())
