"""OpenAI's client against a whole engine, and health while a part of it is replaced."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from openai import OpenAI

from benchmarks.processes import engine_processes


@pytest.fixture
def url(tmp_path, compile_cache) -> Iterator[str]:
    """The root of a running server's HTTP."""
    command = [sys.executable, "-m", "semipd_jax.serve", "--port=0", "--http-port=0"]
    command += ["--max-num-seqs=4", "--max-num-batched-tokens=64"]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--compile-cache-dir", compile_cache], stderr=file)
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"OpenAI API: (\S+)/v1", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield found[1]
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        server.kill()
        server.wait(60)


def health(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def until_health(url: str, status: int) -> str:
    deadline = time.monotonic() + 120
    while (found := health(url))[0] != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found[1]


def test_the_openai_client_and_the_truth_about_a_lost_worker(url: str):
    assert health(url)[0] == 200
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        [model] = client.models.list().data

        def complete() -> str:
            return (
                client.completions.create(
                    model=model.id, prompt="def main():\n", max_tokens=20, temperature=0.0
                )
                .choices[0]
                .text
            )

        text = complete()
        assert text
        stream = client.completions.create(
            model=model.id, prompt="def main():\n", max_tokens=20, temperature=0.0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == text
        engine_processes()["decode worker 1.00"].kill()
        reason = json.loads(until_health(url, 503))["reason"]
        assert "decode worker" in reason
        assert complete() == text  # waits for the replacement
        until_health(url, 200)
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        metrics = reply.read().decode()
    assert re.search(r"semipd:worker_restarts_total\{[^}]*\} 1\.0", metrics)
    assert re.search(r"semipd:generation_tokens_total\{[^}]*\} 60\.0", metrics)
