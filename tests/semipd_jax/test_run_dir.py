import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from semipd_jax import run_dir


@pytest.fixture(autouse=True)
def _temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_directory_is_private_and_new():
    (first, held), (second, also_held) = run_dir.create(), run_dir.create()
    run_dir.check_private(first)
    run_dir.check_private(second)
    assert first != second
    assert {str(path) for path in run_dir.of_this_user()} == {first, second}
    os.close(held)
    os.close(also_held)


def test_what_a_killed_engine_left_goes_with_the_next_start():
    code = """
from semipd_jax import run_dir
import os, pathlib, signal
path, _ = run_dir.create()
pathlib.Path(path, "clients").touch()
print(path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"TMPDIR": tempfile.gettempdir()}
    argv = [sys.executable, "-c", code]
    killed = subprocess.run(argv, stdout=subprocess.PIPE, env=environment, text=True, timeout=60)
    abandoned = Path(killed.stdout.strip())
    assert (abandoned / "clients").exists()
    path, held = run_dir.create()
    assert not abandoned.exists()
    assert os.path.isdir(path)
    os.close(held)


def test_it_stays_while_anybody_holds_it():
    """Also a child that got the descriptor from an engine that is gone."""
    path, held = run_dir.create()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[held]) as keeper:
        os.close(held)
        _, other = run_dir.create()
        os.close(other)
        assert os.path.isdir(path)
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(60)
    _, other = run_dir.create()
    os.close(other)
    assert not os.path.exists(path)


def test_one_that_is_taken_before_it_is_held_is_made_again(monkeypatch):
    """Another start may look for abandoned ones between the two."""
    made: list[str] = []

    def make(prefix: str) -> str:
        path = real(prefix=prefix)
        made.append(path)
        if len(made) < 3:
            os.rmdir(path)
        return path

    real = tempfile.mkdtemp
    monkeypatch.setattr(run_dir.tempfile, "mkdtemp", make)
    path, held = run_dir.create()
    assert path == made[2]
    assert os.path.samestat(os.stat(path), os.fstat(held))
    os.close(held)


def test_what_is_no_directory_of_ours_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "semipd-engine-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "semipd-engine-file").touch()
    (tmp_path / "semipd-other").mkdir()
    path, held = run_dir.create()
    assert (tmp_path / "elsewhere" / "kept").exists()
    assert (tmp_path / "semipd-engine-link").is_symlink()
    assert (tmp_path / "semipd-engine-file").exists()
    assert (tmp_path / "semipd-other").exists()
    run_dir.remove(path)
    assert not os.path.exists(path)
    os.close(held)


def test_a_directory_of_others_is_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="mode 0700"):
        run_dir.check_private(str(tmp_path / "open"))
