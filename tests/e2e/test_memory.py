"""One copy of weights and KV: sharing is measured, not assumed."""

import json
from pathlib import Path

import psutil

from benchmarks.processes import engine_processes
from semipd_jax.demo import MODEL_DIR
from semipd_jax.engine import Engine

MIB = 1 << 20


def test_private_memory_of_workers_does_not_grow_with_the_model(tmp_path, compile_cache):
    """What allocators and the compiler keep differs by some 60 MiB from start to start, whatever
    the model: the weights must be much larger than that for a fifth of them to tell."""
    small, small_bytes = _private_bytes(_checkpoint(tmp_path / "small", 512), compile_cache)
    large, large_bytes = _private_bytes(_checkpoint(tmp_path / "large", 48_000), compile_cache)
    assert large_bytes - small_bytes > 150 * MIB
    assert large - small < 0.2 * (large_bytes - small_bytes)


def _checkpoint(directory: Path, intermediate_size: int) -> Path:
    """The demo model's config with a wider feed-forward part; weights are dummies."""
    directory.mkdir()
    config = json.loads((Path(MODEL_DIR) / "config.json").read_text())
    config["intermediate_size"] = intermediate_size
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _private_bytes(directory: Path, compile_cache: str) -> tuple[int, int]:
    """(anonymous resident memory of both workers after use, size of the weights)."""
    with Engine(
        str(directory),
        tokenizer=str(MODEL_DIR),
        load_format="dummy",
        max_num_seqs=2,
        max_num_batched_tokens=32,
        max_model_len=64,
        compile_cache_dir=compile_cache,
    ) as engine:
        engine.generate([5, 6, 7], max_tokens=8, ignore_eos=True)
        workers = [p for name, p in engine_processes().items() if "worker" in name]
        assert len(workers) == 2
        return sum(_anonymous_bytes(p) for p in workers), engine.layout.weight_bytes


def _anonymous_bytes(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
