from pathlib import Path

import pytest
from tiny_tokenizers import save_byte_level

from semipd_jax.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_byte_level(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_dir: str) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return str(path)
