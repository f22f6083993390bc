"""Filling the cache by the workers themselves, and the start that follows."""

import json

import pytest
from step_cases import TINY_CONFIG

from semipd_jax.compile import __main__ as command
from semipd_jax.compile import here
from semipd_jax.errors import CheckpointError
from semipd_jax.launch.launcher import Launcher
from semipd_jax.messages import FROM_CACHE
from semipd_jax.options import build_config

OPTIONS = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "max_model_len": 64,
    "decode_share_ladder": (0.5,),
}
WORKERS = {"prefill worker 1.00", "decode worker 0.50", "decode worker 1.00"}


def programs_from_cache(model: str, cache: str) -> dict[str, tuple[int, int]]:
    """By worker of an engine that starts: how many came from the cache, of how many."""
    found: dict[str, tuple[int, int]] = {}

    def on_progress(name, progress):
        if progress.stage == FROM_CACHE:
            found[name] = progress.done, progress.total

    config = build_config(model, compile_cache_dir=cache, load_format="dummy", **OPTIONS)
    launcher = Launcher(config, on_progress=on_progress)
    try:
        launcher.start()
    finally:
        launcher.stop()
    return found


@pytest.mark.timeout(600)
def test_a_start_after_it_compiles_nothing(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    flags = ["--model", str(tmp_path), "--compile-cache-dir", str(tmp_path / "filled")]
    flags += ["--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--max-model-len", "64"]
    flags += ["--decode-share-ladder", "0.5"]
    assert command.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in lines} == WORKERS

    filled = programs_from_cache(str(tmp_path), str(tmp_path / "filled"))
    assert filled.keys() == WORKERS
    assert all(hits == total > 0 for hits, total in filled.values())

    empty = programs_from_cache(str(tmp_path), str(tmp_path / "empty"))
    # Both phases compile side by side, and have one small program in common.
    prefill, *decode = (hits for _, (hits, _) in sorted(empty.items(), reverse=True))
    assert prefill + min(decode) <= 1


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert command.main(["--model", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_weights_are_not_needed(tmp_path):
    """A directory with a config alone; what is wrong with it is raised as it is."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="architectures"):
        here.fill(build_config(str(tmp_path), **OPTIONS), lambda *_: None)
