from pathlib import Path

import pytest

from semipd_jax.config_file import FlagKind, read_words
from semipd_jax.errors import ConfigError

FLAGS: dict[str, FlagKind] = {
    "port": "value",
    "http-port": "value",
    "share-ladder": "value",
    "cache": "switch",
    "expose": "mark",
    "api-key": "repeated",
}


@pytest.fixture
def words(tmp_path: Path):
    def read(text: str) -> list[str]:
        (tmp_path / "serve.yaml").write_text(text)
        return read_words(tmp_path / "serve.yaml", FLAGS)

    return read


def test_values_are_words_of_the_command_line(words):
    assert words("port: 7\nhttp_port: off\n") == ["--port=7", "--http-port=off"]
    assert words("share-ladder: [0.5, 1e-1]") == ["--share-ladder=0.5,1e-1"]
    assert words("api-key: [a, 'b']") == ["--api-key=a", "--api-key=b"]
    assert words("api-key: a") == ["--api-key=a"]
    assert words("cache: true") == ["--cache"]
    assert words("cache: False") == ["--no-cache"]
    assert words("expose: true") == ["--expose"]
    assert words("expose: False") == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prt: 1", "'prt' is no option; allowed: port"),
        ("zzz: 1", "allowed: api-key, cache, expose, http-port, port, share-ladder"),
        ("1: 1", "'1' is no option"),
        ("cache: 3", "cache is '3'; allowed: true, false"),
        ("expose: no", "expose is 'no'; allowed: true, false"),
        ("port:", "port is ''"),
        ("port: {a: 1}", "port is {'a': '1'}"),
        ("port: []", "port is "),
        ("share-ladder: [[1]]", "share-ladder is "),
        ("", "has no options"),
        ("- port", "has no options"),
        ("port: [", "is no YAML"),
        ("port: \0", "is no YAML"),
        ("port: " + "1" * (1 << 20), "too long"),
    ],
)
def test_what_is_wrong_is_named(words, text: str, named: str):
    with pytest.raises(ConfigError) as refusal:
        words(text)
    assert named in str(refusal.value)
    assert "serve.yaml" in str(refusal.value)


def test_tags_construct_nothing(words):
    assert words("port: !!python/object/apply:os.system [touch x]") == ["--port=touch x"]


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        read_words(tmp_path / "absent.yaml", FLAGS)
