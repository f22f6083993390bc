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
