"""`semipd-jax profile` on real workers."""

import pytest

from semipd_jax import profile
from semipd_jax.demo import MODEL_DIR
from semipd_jax.tuner.profile import from_json


@pytest.mark.usefixtures("restored_logs")
@pytest.mark.timeout(300)
def test_a_device_is_measured_for_longer_than_a_coordinator_may_be_silent(
    compile_cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("semipd_jax.launch.launcher.COORDINATOR_SILENCE_S", 5.0)
    output = tmp_path / "profile.json"
    flags = f"--max-num-seqs 8 --max-num-batched-tokens 64 --share-ladder 0.5 --output {output}"
    cache = ["--compile-cache-dir", compile_cache]
    assert profile.main(["--model", str(MODEL_DIR), *flags.split(), *cache]) == 0
    made = from_json(output.read_bytes())
    assert made.source == "measured"
    assert made.error.keys() == {"prefill", "decode"}
    assert "mean error of the fit" in capsys.readouterr().out
