import argparse
from pathlib import Path

import pytest

from semipd_jax.errors import ConfigError
from semipd_server import settings as module
from semipd_server.settings import KEY_VARIABLE, Settings, add_flags, take_flags


def parsed(*flags: str, environment: dict[str, str] | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = vars(parser.parse_args(flags)) | {"other": 1}
    found = take_flags(args, environment if environment is not None else {})
    assert args == {"other": 1}
    return found


def test_without_flags_only_this_machine_is_served():
    settings = parsed()
    assert settings == Settings(http_port=8000)
    assert settings.host == "127.0.0.1"
    assert not settings.is_exposed


@pytest.mark.parametrize(
    ("flags", "is_exposed"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "::"], True),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        (["--host", "localhost"], False),
        (["--host", "::1"], False),
    ],
)
def test_an_open_door_is_noticed(flags: list[str], is_exposed: bool):
    assert parsed(*flags).is_exposed == is_exposed


def test_flags_reach_their_fields():
    settings = parsed(
        *("--port", "1", "--http-port", "2", "--api-key", "a", "--api-key", "b"),
        *("--metrics-prefix", "vllm", "--min-priority", "-5", "--request-timeout", "60"),
    )
    assert settings == Settings(
        port=1,
        http_port=2,
        api_keys=("a", "b"),
        metrics_prefix="vllm",
        min_priority=-5,
        request_timeout=60.0,
    )
    assert parsed("--http-port", "off").http_port is None


def test_the_key_may_come_from_the_environment_and_does_not_stay_there():
    environment = {KEY_VARIABLE: "secret", "OTHER": "x"}
    assert parsed(environment=environment).api_keys == ("secret",)
    assert environment == {"OTHER": "x"}
    environment = {KEY_VARIABLE: "secret"}
    assert parsed("--api-key", "flag", environment=environment).api_keys == ("flag",)
    assert environment == {}


@pytest.mark.parametrize("flags", [[], ["--api-key", "flag"]])
def test_an_empty_variable_does_not_open_the_door(flags: list[str]):
    with pytest.raises(ConfigError, match=rf"\${KEY_VARIABLE} is empty; allowed: a key"):
        parsed(*flags, environment={KEY_VARIABLE: ""})


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"port": -1}, "port is -1; allowed: 0 to 65535"),
        ({"http_port": 70000}, "http_port is 70000"),
        ({"metrics_prefix": "a:b"}, "metrics_prefix is 'a:b'"),
        ({"min_priority": -(2**31)}, "min_priority is -2147483648; allowed: -2147483647 to"),
        ({"request_timeout": 0.0}, "request_timeout is 0.0; allowed: a positive number"),
        ({"ssl_keyfile": "k"}, "ssl_certfile"),
        ({"ssl_ca_certs": "c"}, "ssl_keyfile"),
        ({"ssl_keyfile": "/no/key", "ssl_certfile": "/no/cert"}, "/no/key"),
    ],
)
def test_bad_values_are_named(fields: dict, text: str):
    with pytest.raises(ConfigError, match=text):
        Settings(**fields)


@pytest.mark.parametrize("key", ["", "a b", "schlüssel", "a\nb"])
def test_a_bad_key_is_refused_without_showing_it(key: str):
    with pytest.raises(ConfigError) as error:
        Settings(api_keys=(key,))
    assert not key or key not in str(error.value)


def test_a_file_that_is_no_certificate(tmp_path: Path):
    for name in ("key", "cert"):
        (tmp_path / name).write_text("hello")
    with pytest.raises(ConfigError, match="cannot use the certificates"):
        Settings(ssl_keyfile=str(tmp_path / "key"), ssl_certfile=str(tmp_path / "cert"))


def test_without_the_extra_there_is_no_http(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "http_is_installed", lambda: False)
    assert parsed().http_port is None
    with pytest.raises(ConfigError, match=r"semipd-jax\[openai\]"):
        parsed("--http-port", "8000")


def test_settings_travel_to_the_front_end():
    settings = Settings(port=0, http_port=0, api_keys=("a", "b"))
    assert Settings.from_extra(settings.to_extra()) == settings
