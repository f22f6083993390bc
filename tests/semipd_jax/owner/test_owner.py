"""The memory owner as a real process."""

import contextlib
import ctypes
import dataclasses
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from fake_cuda_driver import FakeDriver

from semipd_jax.config import CacheConfig, EngineConfig, ModelConfig, Platform, SchedulerConfig
from semipd_jax.errors import StartupError
from semipd_jax.messages import ChildSpec, Failed, FromChild, MemoryLayout, Progress, Ready
from semipd_jax.models.checkpoint import open_checkpoint
from semipd_jax.models.registry import load_spec
from semipd_jax.storage.mapping import MappedRegion, map_regions
from semipd_jax.storage.server import socket_path

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 3,
}
LARGE = TINY | {"vocab_size": 32_000, "hidden_size": 1024}  # 2 * 125 MiB of embeddings
DECODER = msgspec.json.Decoder[Any](FromChild)


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return str(directory)


def engine_config(model_dir: Path, values: Any = TINY, **options: Any) -> EngineConfig:
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(values))
    return EngineConfig(
        model=ModelConfig(path=str(model_dir), **({"load_format": "dummy"} | options)),
        scheduler=SchedulerConfig(max_num_seqs=4),
    )


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return engine_config(tmp_path / "model")


def spec_line(config: EngineConfig, run_dir: str, platform: Platform = "cpu") -> bytes:
    spec = ChildSpec(name="memory owner", run_dir=run_dir, config=config, platform=platform)
    return msgspec.json.encode(spec) + b"\n"


class Owner(subprocess.Popen[bytes]):
    def __init__(
        self,
        config: EngineConfig,
        run_dir: str,
        stderr: int = subprocess.PIPE,
        platform: Platform = "cpu",
    ) -> None:
        super().__init__(
            [sys.executable, "-m", "semipd_jax.owner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        assert self.stdin
        self.stdin.write(spec_line(config, run_dir, platform))
        self.stdin.flush()
        self.progress: list[Progress] = []

    def hear(self) -> Any:
        """The first message that is no progress."""
        assert self.stdout
        while isinstance(message := DECODER.decode(self.stdout.readline()), Progress):
            self.progress.append(message)
        return message

    def end(self) -> tuple[int, str]:
        """Closes its standard input and waits. Returns status and standard error."""
        _, stderr = self.communicate(timeout=60)
        return self.returncode, (stderr or b"").decode()

    def proc(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()

    def threads(self) -> set[str]:
        return set(os.listdir(f"/proc/{self.pid}/task"))

    def num_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def shared_memory_files(self) -> list[str]:
        """Those it uses that have a name. Only while it opens and closes nothing."""
        used = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{self.pid}/fd")]
        used += self.proc("maps").splitlines()
        return [path for path in used if "/dev/shm/" in path and not path.endswith("(deleted)")]


@contextlib.contextmanager
def running(config: EngineConfig, run_dir: str, **options: Any) -> Iterator[Owner]:
    with Owner(config, run_dir, **options) as owner:
        try:
            yield owner
        finally:
            owner.kill()


def host_view(mapped: MappedRegion, path: str) -> np.ndarray:
    entry = mapped.region.entry(path)
    data = (ctypes.c_uint8 * entry.num_bytes).from_address(mapped.address(path))
    return np.frombuffer(data, entry.dtype).reshape(entry.shape)


def test_loads_serves_and_leaves_nothing_behind(config: EngineConfig, run_dir: str) -> None:
    with running(config, run_dir) as owner:
        ready = owner.hear()
        assert ready.layout == MemoryLayout(
            dtype="float32",
            vocab_size=320,
            max_model_len=128,
            page_size=16,
            num_pages=1 + 4 * 8,
            num_rows=5,
            weight_bytes=ready.layout.weight_bytes,
            kv_bytes=(1 + 4 * 8) * 2 * 2 * (4 * 16 * 16) * 4,
            eos_token_ids=(3,),
        )
        regions = map_regions(run_dir, "cpu", 10.0)
        spec = load_spec(config.model.path)
        expected = open_checkpoint(config.model.path, spec, "dummy", config.model.seed)
        for weight in spec.weights:
            want = np.empty(weight.shape, np.float32)
            expected.read(weight, want)
            assert np.array_equal(host_view(regions["weights"], weight.path), want)
        for entry in regions["state"].region.arrays:
            assert not host_view(regions["state"], entry.path).any()
        assert owner.shared_memory_files() == []
        assert owner.end() == (0, "")
    assert os.listdir(run_dir) == []


def test_serves_device_memory(
    config: EngineConfig, run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole process on a GPU whose driver is `fake_cuda_driver`, outside MPS."""
    fake = """
        import os
        from fake_cuda_driver import FakeDriver

        class Driver(FakeDriver):
            def cuInit(self, flags):
                assert not os.path.exists(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
                return super().cuInit(flags)

        Driver(total_bytes=80 << 30).install()
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(fake))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype="bfloat16"),
        cache=CacheConfig(memory_bytes=4 << 20),
    )
    with running(config, run_dir, platform="cuda") as owner:
        layout = owner.hear().layout
        assert (layout.dtype, layout.page_size) == ("bfloat16", 64)
        assert layout.num_pages == (4 << 20) // (2 * 2 * 4 * 64 * 16 * 2)
        assert 0 < layout.worker_fraction < 0.001
        FakeDriver().install(monkeypatch)
        regions = map_regions(run_dir, "cuda", 10.0)
        spec = load_spec(config.model.path)
        expected = open_checkpoint(config.model.path, spec, "dummy", config.model.seed)
        for weight in spec.weights:
            want = np.empty(weight.shape, ml_dtypes.bfloat16)
            expected.read(weight, want)
            assert np.array_equal(host_view(regions["weights"], weight.path), want)
        for entry in regions["state"].region.arrays:
            assert not host_view(regions["state"], entry.path).any()
        assert owner.end() == (0, "")
    assert os.listdir(run_dir) == []


def test_reports_progress_in_bytes(config: EngineConfig, run_dir: str) -> None:
    with running(config, run_dir) as owner:
        owner.hear()
        done = [message.done for message in owner.progress]
        weights = load_spec(config.model.path).weights
        assert {message.stage for message in owner.progress} == {"load weights"}
        assert done == sorted(set(done))
        assert len(done) == len(weights)
        assert done[-1] == owner.progress[-1].total == sum(4 * np.prod(w.shape) for w in weights)


def test_progress_bar_on_a_terminal(config: EngineConfig, run_dir: str) -> None:
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    try:
        with running(config, run_dir, stderr=stderr) as owner:
            owner.hear()
            assert owner.end()[0] == 0
        assert b"load weights: 100%" in os.read(terminal, 1 << 16)
    finally:
        os.close(terminal)
        os.close(stderr)


def test_keeps_no_private_copy_and_no_jax(tmp_path: Path, run_dir: str) -> None:
    with running(engine_config(tmp_path / "model", LARGE), run_dir) as owner:
        layout = owner.hear().layout
        resident = {k: int(v) for k, v in re.findall(r"(\w+):\s+(\d+) kB", owner.proc("status"))}
        assert layout.weight_bytes > 240 << 20
        assert resident["RssAnon"] << 10 < 100 << 20
        assert resident["RssShmem"] << 10 < 1 << 20  # handed out, not mapped
        assert "safetensors" in owner.proc("maps")
        assert "jaxlib" not in owner.proc("maps")


def test_control_plane_imports_no_jax() -> None:
    script = """
        import sys
        import semipd_jax.owner.__main__, semipd_jax.storage.mapping, semipd_jax.shares.backend
        print(sorted({"jax", "jaxlib", "flax", "orbax", "torch"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=True, timeout=60
    )
    assert done.stdout == b"[]\n"


def test_serves_any_number_of_processes_and_survives_their_death(
    config: EngineConfig, run_dir: str
) -> None:
    worker = """
        import ctypes, os, signal, sys
        from semipd_jax.storage.mapping import map_regions
        regions = map_regions(sys.argv[1], "cpu", 10.0)
        ctypes.memset(regions["state"].address("tokens"), 1, 4)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with running(config, run_dir) as owner:
        owner.hear()
        num_fds = owner.num_fds()
        for _ in range(200):
            with socket.socket(socket.AF_UNIX) as leaves_at_once:
                leaves_at_once.connect(socket_path(run_dir))
        argv = [sys.executable, "-c", textwrap.dedent(worker), run_dir]
        assert subprocess.run(argv, timeout=60, check=False).returncode == -signal.SIGKILL
        regions = map_regions(run_dir, "cpu", 10.0)
        assert host_view(regions["state"], "tokens")[0, 0] == 0x01010101
        deadline = time.monotonic() + 60
        while owner.num_fds() > num_fds:  # the last connection may not be closed yet
            assert time.monotonic() < deadline


def test_mapping_outlives_a_killed_owner(config: EngineConfig, run_dir: str) -> None:
    with running(config, run_dir) as owner:
        owner.hear()
        regions = map_regions(run_dir, "cpu", 10.0)
        before = host_view(regions["weights"], "embed_tokens").copy()
        owner.kill()
        owner.wait(60)
    assert np.array_equal(host_view(regions["weights"], "embed_tokens"), before)
    tokens = host_view(regions["state"], "tokens")
    tokens[...] = 7
    assert (tokens == 7).all()
    with pytest.raises(StartupError, match="refused"):
        map_regions(run_dir, "cpu", 10.0)


def test_launcher_killed(config: EngineConfig, run_dir: str) -> None:
    launcher = """
        import subprocess, sys, time
        argv = [sys.executable, "-m", "semipd_jax.owner"]
        owner = subprocess.Popen(argv, stdin=subprocess.PIPE)
        print(owner.pid, flush=True)  # before the owner speaks up on the same pipe
        owner.stdin.write(sys.argv[1].encode())
        owner.stdin.flush()
        time.sleep(60)
    """
    argv = [sys.executable, "-c", textwrap.dedent(launcher), spec_line(config, run_dir).decode()]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        pid = int(process.stdout.readline())
        owner = os.pidfd_open(pid)
        while b"Ready" not in process.stdout.readline():
            pass
        process.kill()
        process.wait(60)
        assert select.select([owner], [], [], 60)[0]
        assert b"Timeout" not in process.stderr.read(), "it did not leave by itself"
        os.close(owner)
    assert os.listdir(run_dir) == []


def test_stop_while_loading(tmp_path: Path, run_dir: str) -> None:
    """It reports more weights than a pipe holds, so it cannot end before it is heard."""
    many_weights = TINY | {"num_hidden_layers": 200}
    with running(engine_config(tmp_path / "model", many_weights), run_dir) as owner:
        assert owner.stdin
        assert owner.stdout
        owner.stdout.readline()
        owner.terminate()
        threads = owner.threads()
        owner.stdin.close()
        deadline = time.monotonic() + 60
        while threads <= owner.threads():  # the one that watches its standard input ends
            assert time.monotonic() < deadline
        assert b"Ready" not in owner.stdout.read()
        assert owner.stderr
        assert owner.stderr.read() == b""
        assert owner.wait(60) == 0
    assert os.listdir(run_dir) == []


def test_what_cannot_be_served_is_refused(tmp_path: Path, run_dir: str) -> None:
    fine = engine_config(tmp_path / "fine")
    empty = tmp_path / "empty"
    empty.mkdir()
    small_pool = dataclasses.replace(fine, cache=CacheConfig(memory_bytes=1))
    for config, kind, match in (
        (
            dataclasses.replace(fine, model=ModelConfig(path=str(empty))),
            "CheckpointError",
            "config",
        ),
        (engine_config(tmp_path / "auto", load_format="auto"), "CheckpointError", "no weights"),
        (engine_config(tmp_path / "long", max_model_len=129), "StartupError", "allowed: 2 to 128"),
        (small_pool, "StartupError", "kv_cache_memory_bytes"),
    ):
        with running(config, run_dir) as owner:
            failed = owner.hear()
            assert isinstance(failed, Failed)
            assert failed.kind == kind
            assert match in failed.message
            assert owner.end() == (1, "")


def test_directory_of_sockets_that_others_can_enter_is_refused(
    config: EngineConfig, run_dir: str
) -> None:
    os.chmod(run_dir, 0o755)
    with running(config, run_dir) as owner:
        failed = owner.hear()
        assert not isinstance(failed, Ready)
        assert "mode 0700" in failed.message
