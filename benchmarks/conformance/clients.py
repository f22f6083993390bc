"""The clients: what each needs, and a run of it against a server."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SCRIPT: Final = Path(__file__).parent / "openai_client.py"
_TIMEOUT_S: Final = 600
_GATEWAY_START_S: Final = 60.0
_GATEWAY_STOP_S: Final = 20.0
_TTFT_MS, _TPOT_MS = 10_000, 1_000  # this is about protocols, not speed
_REQUESTS: Final = 20
_DURATION_S: Final = 10


@dataclass(frozen=True, slots=True)
class Server:
    """What is tested: addresses, the model's name, and the directory of its tokenizer."""

    grpc: str
    http: str
    model: str
    tokenizer: str


@dataclass(frozen=True, slots=True)
class Client:
    """Packages with their versions, and a run that returns what to report.

    Args of `run`: the server, the environment's bin directory, a directory to write to.
    """

    packages: tuple[str, ...]
    run: Callable[[Server, Path, Path], str]


def run_openai(server: Server, binaries: Path, directory: Path) -> str:
    return _openai_checks(f"{server.http}/v1", server.model, "all", binaries)


def run_smg(server: Server, binaries: Path, directory: Path) -> str:
    """The gateway speaks vLLM's gRPC contract to us, and OpenAI's to its clients."""
    with _gateway(server, binaries, directory) as url:
        return _openai_checks(f"{url}/v1", server.model, "gateway", binaries)


def run_aiperf(server: Server, binaries: Path, directory: Path) -> str:
    goodput = f"time_to_first_token:{_TTFT_MS} inter_token_latency:{_TPOT_MS}"
    _run(
        binaries / "aiperf", "profile", "--model", server.model, "--url", server.http,
        "--endpoint-type", "chat", "--streaming", "--tokenizer", server.tokenizer,
        "--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16",
        "--concurrency", "4", "--request-count", str(_REQUESTS), "--ui", "simple",
        "--goodput", goodput, "--artifact-dir", str(directory),
    )  # fmt: skip
    found = json.loads((directory / "profile_export_aiperf.json").read_text())
    good, total = found["good_request_count"]["avg"], found["request_count"]["avg"]
    _require(total == good == _REQUESTS, f"{good} of {total} requests were good")
    return f"{good:.0f} of {total:.0f} requests good, goodput {found['goodput']['avg']:.1f}/s"


def run_guidellm(server: Server, binaries: Path, directory: Path) -> str:
    spec = {
        "backend": {"kind": "openai_http", "target": server.http, "model": server.model},
        "profile": {"kind": "poisson", "rate": 2},
        "constraints": [{"kind": "max_duration", "seconds": _DURATION_S}],
        "tokenizer": {"kind": "hf_auto", "model": server.tokenizer},
        "data": [{"kind": "synthetic_text", "prompt_tokens": 64, "output_tokens": 16}],
        "metrics": {"kind": "generative", "slo": {"ttft_ms": _TTFT_MS, "tpot_ms": _TPOT_MS}},
        "outputs": [{"kind": "json", "path": str(directory / "guidellm.json")}],
    }
    scenario = directory / "scenario.json"
    scenario.write_text(json.dumps({"metadata": {"name": "conformance"}, "spec": spec}))
    _run(binaries / "guidellm", "run", "--config", str(scenario), "--disable-progress")
    [benchmark] = json.loads((directory / "guidellm.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    _require(totals["successful"] > 0 == totals["errored"], str(totals))
    goodput = metrics["request_goodput"]["successful"]["mean"]
    return f"{totals['successful']} requests, goodput {goodput:.1f}/s"


CLIENTS: Final = {
    "openai": Client(("openai==3.52.0",), run_openai),
    "smg": Client(("smg==1.13.0", "openai==3.52.0"), run_smg),
    "aiperf": Client(("aiperf==0.13.0",), run_aiperf),
    "guidellm": Client(("guidellm==0.8.1",), run_guidellm),
}


def _openai_checks(url: str, model: str, which: str, binaries: Path) -> str:
    checks = _run(binaries / "python", str(_SCRIPT), url, model, which).split()
    return f"{len(checks)} checks: {', '.join(checks)}"


@contextmanager
def _gateway(server: Server, binaries: Path, directory: Path):
    port, metrics_port = 30_100, 30_101
    url = f"http://127.0.0.1:{port}"
    command = [
        str(binaries / "smg"), "launch", "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", f"grpc://{server.grpc}", "--prometheus-port", str(metrics_port),
        "--disable-retries",
    ]  # fmt: skip
    with (directory / "smg.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for_model(f"{url}/v1/models", server.model, process)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_GATEWAY_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_model(url: str, model: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _GATEWAY_START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if model in reply.read().decode():
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the gateway does not offer {model!r}; see smg.log")


def _run(*command: object) -> str:
    """Standard output of a command.

    Raises:
      RuntimeError: it failed; the message ends with what it said last.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    tail = (done.stdout + done.stderr)[-2000:]
    _require(done.returncode == 0, f"{words[0]} ended with {done.returncode}: {tail}")
    return done.stdout


def _require(ok: bool, problem: str) -> None:
    if not ok:
        raise RuntimeError(problem)
