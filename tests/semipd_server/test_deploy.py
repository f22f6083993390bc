"""What is shipped for deployment agrees with the server that it deploys."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from semipd_jax import serve
from semipd_jax.config import EngineConfig
from semipd_jax.demo import MODEL_DIR
from semipd_jax.runtime.cache_dir import location
from semipd_server.auth import Keys
from semipd_server.openai.door import OPEN_PATHS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "server" / "deploy"
OBJECTS = {o["kind"]: o for o in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


def configured(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What `serve` would start with, for a model that is here."""
    (tmp_path / "serve.yaml").write_text(text)
    found: list[Any] = []
    monkeypatch.setattr(serve, "setproctitle", lambda _: None)
    monkeypatch.setattr(serve.logs, "configure", lambda *_: None)
    monkeypatch.setattr(serve, "_serve", lambda *args: found.extend(args) or 0)
    flags = [f"--config={tmp_path / 'serve.yaml'}", f"--model={MODEL_DIR}", "--api-key=x"]
    assert serve.main(flags) == 0
    return found[0], found[1]


def shutdown_s(config: EngineConfig) -> float:
    return config.timeouts.shutdown_s


def test_the_config_file_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (DEPLOY / "serve.yaml").read_text()
    config, settings = configured(text, tmp_path, monkeypatch)
    assert config.log_format == "json"
    assert (settings.port, settings.http_port) == (50051, 8000)
    assert not settings.is_exposed


def test_the_pod_agrees_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = OBJECTS["ConfigMap"]["data"]["serve.yaml"]
    config, settings = configured(text, tmp_path, monkeypatch)
    ports = {p["name"]: p["containerPort"] for p in CONTAINER["ports"]}
    assert ports == {"grpc": settings.port, "http": settings.http_port}
    for name in ("startupProbe", "readinessProbe"):
        assert CONTAINER[name]["httpGet"] == {"path": "/health", "port": "http"}
    live = CONTAINER["livenessProbe"]
    assert live["httpGet"] == {"path": "/dashboard", "port": "http"}, "200 while a part is replaced"
    assert {"/health", "/dashboard"} <= OPEN_PATHS, "probes have no key"
    probe = CONTAINER["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= config.timeouts.startup_s
    pre_stop_s = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > pre_stop_s + shutdown_s(config) + 12
    mounts = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounts == {volume["name"] for volume in POD["volumes"]}
    [key] = CONTAINER["env"]
    assert key["name"] == "SEMIPD_API_KEY"
    service = {p["targetPort"]: p["port"] for p in OBJECTS["Service"]["spec"]["ports"]}
    assert service == ports


def test_compiled_programs_of_the_pod_are_on_a_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = OBJECTS["ConfigMap"]["data"]["serve.yaml"]
    config, _ = configured(text, tmp_path, monkeypatch)
    volumes = [m["mountPath"] for m in CONTAINER["volumeMounts"] if not m.get("readOnly")]
    where = location(config.compile_cache_dir)
    assert any(where.is_relative_to(volume) for volume in volumes)


def test_the_monitor_may_read_the_metrics_of_the_pod():
    monitor = yaml.safe_load((DEPLOY / "podmonitor.yaml").read_text())["spec"]
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in CONTAINER["ports"]}
    assert endpoint["path"] == "/metrics"
    assert endpoint["path"] not in OPEN_PATHS
    [key] = CONTAINER["env"]
    authorization = endpoint["authorization"]
    assert authorization["credentials"] == key["valueFrom"]["secretKeyRef"]
    assert Keys(["a key"]).holder(f"{authorization['type']} a key") is not None
    assert "prometheus.io" not in (DEPLOY / "kubernetes.yaml").read_text(), "it has no key"


def test_the_unit_s_control_socket_is_where_its_text_says():
    unit = (DEPLOY / "semipd.service").read_text()
    [named] = re.findall(r"control --server unix:(\S+)", unit)
    [path] = re.findall(r"^    --control-socket (\S+)$", unit, re.MULTILINE)
    [directory] = re.findall(r"^RuntimeDirectory=(\w+)$", unit, re.MULTILINE)
    assert path == named
    assert Path(path).parent == Path("/run") / directory
    readme = (ROOT / "README.md").read_text()
    assert f"unix:{path}" in readme


def test_the_unit_s_compiled_programs_are_in_its_cache_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It has no home, and may write nowhere else."""
    unit = (DEPLOY / "semipd.service").read_text()
    config, _ = configured((DEPLOY / "serve.yaml").read_text(), tmp_path, monkeypatch)
    [directory] = re.findall(r"^CacheDirectory=(\w+)$", unit, re.MULTILINE)
    for variables in re.findall(r"^Environment=(.+)$", unit, re.MULTILINE):
        for variable in variables.split():
            monkeypatch.setenv(*variable.split("="))
    assert location(config.compile_cache_dir).is_relative_to(Path("/var/cache") / directory)


def test_the_unit_waits_for_the_drain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unit = (DEPLOY / "semipd.service").read_text()
    config, _ = configured((DEPLOY / "serve.yaml").read_text(), tmp_path, monkeypatch)
    stop_s = float(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0])
    assert stop_s > shutdown_s(config) + 12, "a drain would be cut short"
    assert "KillMode=mixed" in unit, "the launcher decides when its children stop"


def test_the_unit_does_not_repeat_what_cannot_go_well(capsys: pytest.CaptureFixture[str]):
    unit = (DEPLOY / "semipd.service").read_text()
    [status] = re.findall(r"^RestartPreventExitStatus=(\d+)$", unit, re.MULTILINE)
    assert serve.main(["--port=-1"]) == int(status)
    assert "port is -1" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path):
    unit = (DEPLOY / "semipd.service").read_text()
    path = tmp_path / "semipd.service"
    path.write_text(unit.replace("/opt/semipd/bin/semipd-jax", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    complaints = [line for line in done.stderr.splitlines() if "semipd.service" in line]
    assert complaints == []


def test_the_image_s_parts_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    assert re.search(r"^USER (?!root)\w+$", text, re.MULTILINE)
    extras = re.findall(r"\[([\w,]+)\]\"", text)[0].split(",")
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras)
