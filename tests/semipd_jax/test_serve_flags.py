"""What `serve` makes of its flags before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from fake_coordinator import layout

from semipd_jax import options, serve
from semipd_jax.config import EngineConfig
from semipd_jax.demo import MODEL_DIR
from semipd_jax.errors import ConfigError, EngineError, StartupError
from semipd_jax.launch.launcher import Launcher
from semipd_server import cli
from semipd_server.settings import KEY_VARIABLE, Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """What would be started with these flags; fails if they are refused."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr(serve, "setproctitle", lambda _: None)
    monkeypatch.setattr(serve.logs, "configure", lambda *_: None)

    def run(*flags: str) -> tuple[EngineConfig, Settings]:
        seen: list[Any] = []
        monkeypatch.setattr(serve, "_serve", lambda *found: seen.extend(found) or 0)
        assert serve.main(flags) == 0
        config, settings = seen
        return config, settings

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Why these flags are refused; fails if anything starts."""

    def run(*flags: str) -> str:
        monkeypatch.setattr(serve, "_serve", lambda *_: pytest.fail("it starts"))
        assert serve.main(flags) == 2
        return capsys.readouterr().err

    return run


def test_without_flags_the_demo_model_is_served(started):
    config, settings = started()
    assert config.model.path == str(MODEL_DIR)
    assert (config.log_level, config.log_format) == ("info", "text")
    assert settings == Settings(http_port=8000)


@pytest.mark.parametrize(
    ("flags", "is_warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        ([], False),
    ],
)
def test_an_open_door_is_warned_of(
    started, caplog: pytest.LogCaptureFixture, flags: list[str], is_warned: bool
):
    started(*flags)
    assert ("whoever reaches 0.0.0.0 may use the engine" in caplog.text) == is_warned


def test_a_file_has_the_flags_names_and_flags_win(started, tmp_path: Path):
    file = tmp_path / "serve.yaml"
    file.write_text(
        "max-num-seqs: 7\nmax_num_batched_tokens: 64\nport: 1\nhttp-port: off\n"
        "api-key: [a, b]\nenable-prefix-caching: false\nshare-ladder: [0.5, 0.8]\n"
        "log-format: json\n"
    )
    config, settings = started("--config", str(file))
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (7, 64)
    assert not config.cache.enable_prefix_caching
    assert config.shares.ladder == (0.5, 0.8)
    assert (config.log_level, config.log_format) == ("info", "json")
    assert settings == Settings(port=1, api_keys=("a", "b"))
    config, settings = started(
        f"--config={file}", "--max-num-seqs=9", "--api-key=c", "--enable-prefix-caching"
    )
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (9, 64)
    assert config.cache.enable_prefix_caching
    assert settings.api_keys == ("c",)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--decode-share=1.5", "decode_share is 1.5; allowed: above 0 and at most 1"),
        ("--trust-remote-code", "never runs code"),
        ("--dtype=int3", "invalid choice: 'int3'"),
        ("--max-num-seqs=x", "--max-num-seqs: invalid int value: 'x'"),
        ("--max-num=3", "unrecognized arguments: --max-num=3"),
        ("--port=70000", "port is 70000; allowed: 0 to 65535"),
        ("--log-format=xml", "invalid choice: 'xml'"),
        ("--http-port=x", "--http-port: 'x'; allowed: 0 to 65535, or off"),
        ("--model=/absent", "/absent"),
        ("--tokenizer=/absent", "/absent has no tokenizer.json"),
        ("--max-model-len=1000000", "max_model_len is 1000000; allowed: 2 to "),
        ("--compile-cache-dir=/proc/programs", "compile_cache_dir is '/proc/programs'; allowed: a"),
        ("--control-socket=/absent/socket", "control_socket is '/absent/socket'; allowed: a path"),
        ("--control-socket=/proc", "control_socket"),
        ("--config=/absent", "/absent"),
    ],
)
def test_bad_flags_are_refused_before_anything_starts(refused, flag: str, reason: str):
    assert reason in refused(flag)


def test_a_cache_that_others_may_write_to_is_refused(refused, tmp_path: Path):
    tmp_path.chmod(0o777)
    reason = refused(f"--compile-cache-dir={tmp_path}")
    assert f"compile_cache_dir is '{tmp_path}'; allowed: a directory of this user" in reason


def test_what_a_file_turns_off_is_off(started, tmp_path: Path):
    (tmp_path / "serve.yaml").write_text("expose-control: false\nreflection: false\n")
    _, settings = started(f"--config={tmp_path / 'serve.yaml'}")
    assert (settings.expose_control, settings.reflection) == (False, False)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("decode-share: 1.5", "decode_share is 1.5"),
        ("max-num-seq: 3", "'max-num-seq' is no option; allowed: max-num-seqs"),
        ("dtype: int3", "invalid choice: 'int3'"),
        ("config: other.yaml", "'config' is no option"),
        ("help: true", "'help' is no option"),
    ],
)
def test_a_bad_line_of_the_file_is_refused(refused, tmp_path: Path, line: str, reason: str):
    (tmp_path / "serve.yaml").write_text(line)
    assert reason in refused(f"--config={tmp_path / 'serve.yaml'}")


def test_a_model_that_cannot_be_served_is_refused(refused, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    reason = refused(f"--model={tmp_path}")
    assert "GPT2LMHeadModel" in reason
    assert "LlamaForCausalLM" in reason


def test_help_has_groups_and_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: semipd-jax serve [--config FILE]")
    for title in ("serving:", "model:", "KV cache:", "scheduling:", "compute shares:", "timeouts:"):
        assert title in text
    assert "--max-num-seqs N most requests running at once [32]" in text
    assert "--port PORT gRPC port; 0 takes a free one [50051]" in text


def test_versions(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["serve", "--version"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("semipd-jax 0.")


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["sreve"]) == 2
    assert "command is 'sreve'" in capsys.readouterr().err


def test_a_server_says_how_to_reach_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Settings, "client_flags", " --ssl-ca-certs server.pem")
    config = options.build_config(str(MODEL_DIR))
    launcher = Launcher(config)
    launcher.address = "127.0.0.1:1"
    serve._announce(launcher, config, Settings(), layout(), 1.5)
    command = 'client --target 127.0.0.1:1 --ssl-ca-certs server.pem "def main():"'
    assert command in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_server_says_where_it_is(
    form: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "semipd_jax.serve")
    config = options.build_config(str(MODEL_DIR), served_model_name="demo", log_format=form)
    launcher = Launcher(config)
    launcher.address, launcher.http_address = "127.0.0.1:1", "http://127.0.0.1:2"
    serve._announce(launcher, config, Settings(), layout(max_model_len=160), 1.5)
    told, logged = capsys.readouterr().err, caplog.text
    if form == "json":
        told, logged = logged, told
    assert "KV cache: 1,600 tokens; room for 10.0 requests of 160" in told
    assert "demo is served at 127.0.0.1:1 after 1.5 s" in told
    assert "http://127.0.0.1:2/v1; live view: http://127.0.0.1:2/dashboard" in told
    assert logged == ""


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("page_size is 7"), 2), (StartupError("no room"), 1)]
)
def test_a_start_that_fails_has_the_status_of_its_reason(
    error: EngineError, status: int, monkeypatch: pytest.MonkeyPatch
):
    class Failing(Launcher):
        def start(self) -> Any:
            self.error = error
            raise error

    monkeypatch.setattr(serve, "Launcher", Failing)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    assert serve._serve(options.build_config(str(MODEL_DIR)), Settings(port=0)) == status
