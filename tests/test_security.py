"""What no source file may do, and what no model directory can make it do."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from removed_rules import Removal, load
from server_rig import save_model

from semipd_jax.errors import CheckpointError
from semipd_jax.models.registry import load_spec
from semipd_jax.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
REMOVALS = load()
SOURCES = [
    path
    for folder in ("semipd_jax", "kernels_pallas", "server", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

MODULES = {
    *("pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"),
    *("multiprocessing.managers", "multiprocessing.shared_memory", "xmlrpc"),
}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"recv_pyobj", "send_pyobj", "unsafe_load", "full_load", "tobuffer_pickle"}
ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("yaml", "Loader")}
KEYWORDS = {"allow_pickle", "shell", "trust_remote_code"}


def offences(source: str) -> Iterator[str]:
    """What is wrong with a file: code from data, shells, and objects that carry code."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (n.name for n in names if n.name in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                full = {module, *(f"{module}.{n.name}" for n in names)}
                yield from full & MODULES
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            case ast.Attribute(attr=name) if name in METHODS:
                yield name
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in ATTRIBUTES:
                yield f"{owner}.{name}"
            case ast.keyword(arg=str(name), value=ast.Constant(value=True)) if name in KEYWORDS:
                yield f"{name}=True"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_data_or_unpickles(path: Path):
    assert list(offences(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import marshal as m", "eval('1')"),
        *("exec(code)", "__import__(name)", "socket.recv_pyobj()", "torch.load(path)"),
        *("np.load(path, allow_pickle=True)", "run(command, shell=True)", "os.system('x')"),
        *("yaml.load(text, yaml.Loader)", "load(path, trust_remote_code=True)"),
        "from multiprocessing import shared_memory",
    ],
)
def test_the_scan_finds(source: str):
    assert list(offences(source)) != []


def booby_trap(directory: Path, marker: Path) -> None:
    """Code beside a model that would leave a mark, named wherever transformers looks for code."""
    code = f"open({str(marker)!r}, 'w').close()\nclass Model: pass\nclass Tokenizer: pass\n"
    for name in ("modeling_x", "tokenization_x", "configuration_x"):
        (directory / f"{name}.py").write_text(code)
    for name, entry in (
        ("config.json", {"AutoConfig": "configuration_x.Model", "AutoModel": "modeling_x.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.Tokenizer", None]}),
    ):
        path = directory / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | {"auto_map": entry}))


def test_code_beside_a_model_is_never_run(tmp_path: Path):
    model, marker = tmp_path / "model", tmp_path / "marker"
    model.mkdir()
    save_model(model)
    booby_trap(model, marker)
    with pytest.raises(CheckpointError, match="auto_map"):
        load_spec(model)
    assert load_tokenizer(str(model)).encode("x")
    assert not marker.exists()


def test_a_server_refuses_such_a_model_before_it_starts(tmp_path: Path):
    model, marker = tmp_path / "model", tmp_path / "marker"
    model.mkdir()
    save_model(model)
    booby_trap(model, marker)
    command = [sys.executable, "-m", "semipd_jax.serve", "--model", str(model), "--port=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "remote code is never run" in done.stderr
    assert not marker.exists()


def rules() -> dict[str, list[str]]:
    """Rules of the security page, and the tests that their rows name."""
    page = (ROOT / "docs" / "SECURITY.md").read_text()
    rows = re.findall(r"^\| ([A-Z].*) \| (`tests/.*) \|$", page, re.MULTILINE)
    return {rule: re.findall(r"`([^`]+)`", tests) for rule, tests in rows}


def test_the_tests_that_the_security_page_names_are_there():
    named = [test for tests in rules().values() for test in tests]
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("rule", rules())
def test_every_rule_can_be_removed(rule: str):
    """Whether it is missed then, `removed_rules.py` finds out."""
    assert any(rule.startswith(removal.rule) for removal in REMOVALS)


@pytest.mark.parametrize("removal", REMOVALS, ids=lambda r: f"{r.rule}-{Path(r.path).name}")
def test_what_removes_a_rule_still_applies(removal: Removal):
    assert (ROOT / removal.path).read_text().count(removal.old) == 1
    [tests] = [tests for rule, tests in rules().items() if rule.startswith(removal.rule)]
    path, _, name = removal.test.partition("::")
    assert path in tests or any(Path(test) in Path(path).parents for test in tests)
    assert f"def {name}(" in (ROOT / path).read_text() or not name
