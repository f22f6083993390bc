"""The program cache between processes, and what the counter counts."""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from semipd_jax.errors import ConfigError
from semipd_jax.runtime import cache
from semipd_jax.runtime.cache import CacheUse, directory_name, enable_cache, fingerprint
from semipd_jax.runtime.cache_dir import cache_root, location
from semipd_jax.runtime.compile import CompileCounter

COMPILE_ONE = textwrap.dedent(
    """
    import sys, warnings
    import jax, jax.numpy as jnp
    from semipd_jax.runtime.cache import CacheUse, enable_cache

    warnings.simplefilter("ignore")
    enable_cache(sys.argv[1], "cpu")
    use = CacheUse()
    program = jax.jit(lambda x: x * 2 + 1).lower(jnp.float32(0)).compile()
    print(float(program(jnp.float32(20))), use.num_hits, use.num_misses)
    """
)


def start(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE_ONE, str(directory)], stdout=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    return out.split()


def test_programs_are_kept_between_processes_and_damage_is_survived(tmp_path):
    directory = tmp_path / "programs"
    together = [start(directory) for _ in range(2)]
    assert [result(p)[0] for p in together] == ["41.0", "41.0"]
    assert directory.stat().st_mode & 0o777 == 0o700
    value, hits, misses = result(start(directory))
    assert (value, int(hits) > 0, misses) == ("41.0", True, "0")

    (kind,) = directory.iterdir()
    assert kind.stat().st_mode & 0o777 == 0o700
    entries = list(kind.glob("*-cache"))
    assert entries
    for i, entry in enumerate(entries):
        content = entry.read_bytes()
        entry.write_bytes(content[: len(content) // 2] if i % 2 else b"\0" * len(content))
    value, hits, _ = result(start(directory))
    assert (value, hits) == ("41.0", "0")


@pytest.mark.parametrize(
    ("given", "caches", "where"),
    [
        ("/mine", "/caches", "/mine"),
        (None, "/caches", "/caches/semipd_jax"),
        (None, "", "/home/ada/.cache/semipd_jax"),
        (None, "not/absolute", "/home/ada/.cache/semipd_jax"),
    ],
)
def test_programs_are_in_the_users_cache_directory(given, caches, where, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", caches)
    monkeypatch.setenv("HOME", "/home/ada")
    assert location(given) == Path(where)


def test_a_user_without_home_has_to_name_a_directory(monkeypatch):
    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.raises(ConfigError, match="compile_cache_dir"):
        cache_root(None)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path, mode):
    directory = tmp_path / "programs"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ConfigError, match="compile_cache_dir"):
        enable_cache(str(directory), "cpu")


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="directory of this user"):
        enable_cache(str(tmp_path), "cpu")


def test_a_directory_inside_that_others_may_write_to_is_refused(tmp_path):
    inside = tmp_path / directory_name("cpu", fingerprint("cpu"))
    inside.mkdir()
    inside.chmod(0o722)
    with pytest.raises(ConfigError, match=inside.name):
        enable_cache(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sms", "66"),
        ("kind", "NVIDIA H200"),
        ("client", "cuda 13010"),
        ("driver", "NVRM version: 590.1"),
        ("nvidia-cudnn-cu13", "9.11"),
        ("jax-cuda13-plugin", "0.11.3"),
        ("NVIDIA_TF32_OVERRIDE", "0"),
    ],
)
def test_whatever_changes_machine_code_has_a_directory_of_its_own(name, value):
    parts = {"kind": "NVIDIA H100", "client": "cuda 13000", "sms": "132", "driver": "NVRM 580"}
    assert directory_name("cuda", parts) == directory_name("cuda", dict(reversed(parts.items())))
    assert directory_name("cuda", parts) != directory_name("cuda", parts | {name: value})


def test_fingerprint_of_this_machine():
    found = fingerprint("cpu")
    assert {"kind", "client", "cpu", "jax", "jaxlib"} <= found.keys()
    assert found["jax"] == jax.__version__
    assert "jaxtyping" not in found
    assert "avx" in found["cpu"] or "aarch64" in found["cpu"]
    assert found == fingerprint("cpu")


def test_settings_in_the_environment_count(monkeypatch):
    before = fingerprint("cpu")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    assert fingerprint("cpu") == before | {"MOSAIC_GPU_DUMP_PTX": "1"}


def test_a_gpu_is_told_by_the_sms_that_this_process_sees(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"
        core_count = 66
        client = SimpleNamespace(platform_version="cuda 13000")

    monkeypatch.setattr(cache.jax, "devices", lambda: [Device()])
    assert fingerprint("cuda")["sms"] == "66"
    assert directory_name("cuda", fingerprint("cuda")).startswith("cuda-66sm-")


def test_use_of_the_cache_is_counted():
    use = CacheUse()
    jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
    jax.monitoring.record_event("/jax/compilation_cache/cache_misses")
    jax.monitoring.record_event("/jax/compilation_cache/cache_misses")
    assert (use.num_hits, use.num_misses) == (1, 2)


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
