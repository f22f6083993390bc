import pytest
from tiny_tokenizers import save_byte_fallback, save_byte_level

from semipd_jax.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_byte_fallback(tmp_path_factory.mktemp("byte_fallback")))
