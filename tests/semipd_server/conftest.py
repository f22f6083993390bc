from functools import partial
from pathlib import Path

import pytest
from server_rig import Start, save_model, serving

from semipd_jax.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(model_dir: str) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return str(path)


@pytest.fixture
def start(run_dir: str, tokenizer: Tokenizer) -> Start:
    return partial(serving, run_dir, tokenizer)


@pytest.fixture(autouse=True)
def patience_with_the_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is polled by the loop that also serves."""
    for asks in ("gate", "live", "metrics", "vllm.servicer"):
        monkeypatch.setattr(f"semipd_server.{asks}._STATS_TIMEOUT_S", 60.0)
    monkeypatch.setattr("semipd_server.top._TIMEOUT_S", 60.0)
