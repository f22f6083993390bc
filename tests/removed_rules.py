"""Removes the rules of docs/SECURITY.md, one edit at a time: a test must fail after each.

    python tests/removed_rules.py [WORD ...]

The edits are in removed_rules.toml. Works in a copy of the tree and takes about ten minutes; words
choose rules whose rows begin with them. Edits of a contract need grpcio-tools. Exits with 1 if a
rule is not missed. `test_security.py` checks that there are edits for every rule, and that all of
them still apply.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
_TIMEOUT_S: Final = 300
_TESTS_FAILED: Final = 1  # pytest's status
_IGNORED: Final = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "results")


@dataclass(frozen=True, slots=True)
class Removal:
    """An edit after which a rule does not hold.

    Attributes:
      rule: beginning of its row.
      test: what must fail then, as pytest takes it.
    """

    rule: str
    path: str
    old: str
    new: str
    test: str


def load() -> list[Removal]:
    rules = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return [Removal(rule, **edit) for rule, edits in rules.items() for edit in edits]


def main(words: Sequence[str]) -> int:
    chosen = [r for r in load() if not words or r.rule.startswith(tuple(words))]
    if find_spec("grpc_tools") is None:
        print("without grpcio-tools, contracts are not edited")
        chosen = [r for r in chosen if not r.path.endswith(".proto")]
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        shutil.copytree(ROOT, tree, ignore=_IGNORED)
        wrong = _pytest(tree, {r.test for r in chosen})
        print("with all rules:", "WRONG: tests fail" if wrong else "tests pass", flush=True)
        for removal in chosen:
            status = _without(tree, removal)
            is_missed = status == _TESTS_FAILED
            wrong += not is_missed
            verdict = "missed" if is_missed else f"WRONG: pytest ends with {status}"
            print(f"{removal.rule}, {removal.path}: {verdict}", flush=True)
    return 1 if wrong else 0


def _without(tree: Path, removal: Removal) -> int:
    """pytest's status after the edit, which is taken back."""
    path = tree / removal.path
    text = path.read_text()
    _write(path, text.replace(removal.old, removal.new))
    try:
        _generate(tree, path)
        return _pytest(tree, {removal.test})
    finally:
        _write(path, text)
        _generate(tree, path)


def _write(path: Path, text: str) -> None:
    """With a time of its own, by which bytecode that is out of date is known as such."""
    written_s = path.stat().st_mtime + 2
    path.write_text(text)
    os.utime(path, (written_s, written_s))


def _generate(tree: Path, path: Path) -> None:
    """Stubs, if `path` is a contract."""
    if path.suffix == ".proto":
        flags = [f"-Isemipd_server/pb={path.parent}", f"--python_out={tree}/server", str(path)]
        command = [sys.executable, "-m", "grpc_tools.protoc", *flags]
        subprocess.run(command, check=True, timeout=_TIMEOUT_S)


def _pytest(tree: Path, tests: set[str]) -> int:
    """Its status; tests that do not end in time have failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qx",
        "--timeout=60",
        "-p",
        "no:cacheprovider",
        *sorted(tests),
    ]
    environment = os.environ | {
        "PYTHONPATH": f"{tree}:{tree}/server",
        "PYTHONDONTWRITEBYTECODE": "",  # compiled once, most of the time is saved
        "JAX_PLATFORMS": "cpu",
    }
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _TESTS_FAILED
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
