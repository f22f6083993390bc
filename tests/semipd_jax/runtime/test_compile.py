"""The program cache between processes, and what the counter counts."""

import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from semipd_jax.errors import ConfigError
from semipd_jax.runtime.compile import CompileCounter, enable_cache

COMPILE_ONE = textwrap.dedent(
    """
    import sys, warnings
    import jax, jax.numpy as jnp
    from semipd_jax.runtime.compile import enable_cache

    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
    )
    warnings.simplefilter("ignore")
    enable_cache(sys.argv[1])
    program = jax.jit(lambda x: x * 2 + 1).lower(jnp.float32(0)).compile()
    print(float(program(jnp.float32(20))), len(hits))
    """
)


def start(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE_ONE, str(directory)], stdout=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.split()


def test_programs_are_kept_between_processes_and_damage_is_survived(tmp_path):
    directory = tmp_path / "programs"
    together = [start(directory) for _ in range(2)]
    assert [result(p)[0] for p in together] == ["41.0", "41.0"]
    assert directory.stat().st_mode & 0o777 == 0o700
    value, hits = result(start(directory))
    assert (value, int(hits) > 0) == ("41.0", True)

    entries = list(directory.glob("*-cache"))
    assert entries
    for i, entry in enumerate(entries):
        content = entry.read_bytes()
        entry.write_bytes(content[: len(content) // 2] if i % 2 else b"\0" * len(content))
    assert result(start(directory)) == ["41.0", "0"]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path, mode):
    directory = tmp_path / "programs"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ConfigError, match="compile_cache_dir"):
        enable_cache(str(directory))


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="directory of this user"):
        enable_cache(str(tmp_path))


def test_the_counter_sees_every_compile_eager_operations_included():
    x = jax.device_put(jnp.arange(7))
    program = jax.jit(lambda x: x * 3).lower(x).compile()
    counter = CompileCounter()
    program(x).block_until_ready()
    assert counter.count == 0
    jax.jit(lambda x: x * 5)(x)
    assert counter.count == 1
    x[2:5]  # an eager slice of this shape was never compiled
    assert counter.count > 1
