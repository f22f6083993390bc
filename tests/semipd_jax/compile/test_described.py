"""Compiling for a GPU that is not here, and what is said about its limits."""

import _thread
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from launch_rig import wait_until
from step_cases import TINY_CONFIG

from semipd_jax.compile import __main__ as command
from semipd_jax.compile import described
from semipd_jax.errors import StartupError
from semipd_jax.options import build_config

SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 64}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    return str(tmp_path)


def test_every_program_of_every_rung_compiles_for_the_sms_of_its_share(model):
    progress = []
    programs = described.compile_all(
        build_config(model, **SMALL, decode_share=0.5), "h100", jobs=2,
        show=lambda name, p: progress.append((name, p.done, p.total)),
    )  # fmt: skip
    assert [(p.lane, p.share, p.num_sms, p.problem) for p in programs] == [
        ("decode", 0.5, 66, None),
        ("prefill", 1.0, 132, None),
    ]
    assert sorted(progress) == sorted(
        (name, done, 1) for name in ("prefill 1.00", "decode 0.50") for done in (0, 1)
    )


def test_a_compiler_that_takes_its_process_along_is_named(model, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, os; print('LLVM ERROR', file=sys.stderr, flush=True); os._exit(134)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StartupError, match=r"decode 1\.00: status 134: LLVM ERROR"):
        described.compile_all(build_config(model), "h100", jobs=1, show=lambda *_: None)


def test_a_compiler_that_does_not_even_read_its_job_is_named(model, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = build_config(model, served_model_name="m" * (1 << 20))  # more than a pipe holds
    with pytest.raises(StartupError, match=r"decode 1\.00: status 3"):
        described.compile_all(config, "h100", jobs=1, show=lambda *_: None)


@pytest.fixture
def compilers(monkeypatch):
    """Those that have been started."""
    started = []

    class Compiler(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Compiler)
    return started


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_ends_the_compilers(model, monkeypatch, tmp_path, compilers, jobs):
    """Even one that wakes no thread, as one that comes just before the thread begins to wait. Who
    has not started by then never does."""
    (tmp_path / "sitecustomize.py").write_text("import os, time; time.sleep(100); os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def interrupt():
        wait_until(lambda: len(compilers) == jobs)
        _thread.interrupt_main()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        described.compile_all(build_config(model), "h100", jobs=jobs, show=lambda *_: None)
    interrupter.join()
    assert [compiler.wait(60) for compiler in compilers] == [-signal.SIGKILL] * jobs


def test_a_compiler_that_fails_ends_the_others(model, monkeypatch, tmp_path, compilers):
    is_at_work = tmp_path / "is_at_work"
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, pathlib, time
is_at_work = pathlib.Path({str(is_at_work)!r})
if b'"lane":"prefill"' in os.read(0, 1 << 16):
    is_at_work.touch()
    time.sleep(100)
while not is_at_work.exists():
    time.sleep(0.02)
os._exit(3)
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StartupError, match=r"decode 1\.00: status 3"):
        described.compile_all(build_config(model), "h100", jobs=2, show=lambda *_: None)
    assert sorted(compiler.wait(60) for compiler in compilers) == [-signal.SIGKILL, 3]


def test_a_compiler_that_nobody_listens_to_ends():
    """It waits for its job here, and would wait for ever."""
    with subprocess.Popen(
        [sys.executable, "-m", "semipd_jax.compile.child"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ) as compiler:  # fmt: skip
        try:
            compiler.stdout.close()
            assert compiler.wait(120) == 1
            assert compiler.stderr.read() == b""
        finally:
            compiler.kill()


def test_bad_options_are_refused_before_anything_is_compiled(capsys):
    assert command.main(["--max-num-seqs", "0", "--gpu", "h100"]) == 2
    assert "max_num_seqs is 0" in capsys.readouterr().err


def test_what_the_limits_say_of_jax_is_true(tmp_path):
    """If this fails, there may be more to gain than `LIMITS` says."""
    script = """
        import os, sys, warnings
        import jax, jax.numpy as jnp
        from semipd_jax.runtime.described_gpu import DescribedGpu

        jax.config.update("jax_compilation_cache_dir", sys.argv[1])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        gpu = DescribedGpu("h100")
        print(repr(gpu._device.client.platform_version))
        warnings.simplefilter("always")
        for _ in range(2):
            gpu.compile(lambda x: x * 2, jax.ShapeDtypeStruct((8,), jnp.float32))
            print(sum("lambda" in name for name in os.listdir(sys.argv[1])))
            jax.clear_caches()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True, text=True, timeout=240, check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "true"},
    )  # fmt: skip
    client, *stored = done.stdout.splitlines()
    assert "cuda" not in client  # the version that a client with a GPU has
    assert stored == ["1", "1"]
    assert "must be constructed with a Client to call DeserializeLoadedExecutable" in done.stderr
