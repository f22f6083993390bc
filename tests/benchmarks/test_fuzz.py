"""A small run of `benchmarks.fuzz`, against a front end without an engine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from server_rig import save_model, serving

from benchmarks.fuzz.inputs import BODIES
from benchmarks.fuzz.run import Outcome, fuzz
from semipd_jax.text.tokenizer import load_tokenizer
from semipd_server import servicer
from semipd_server.openai.app import Routes


def fuzzed(directory: Path, num_inputs: int) -> tuple[Outcome, int]:
    """The outcome, and how many requests were left behind."""
    (directory / "model").mkdir()
    run_dir = directory / "run"
    run_dir.mkdir(mode=0o700)
    tokenizer = load_tokenizer(save_model(directory / "model"))

    async def main() -> tuple[Outcome, int]:
        async with serving(str(run_dir), tokenizer) as rig:
            answering = asyncio.create_task(rig.fake.serve())
            try:
                outcome = await fuzz(rig.address, rig.url, num_inputs=num_inputs, batch=200)
                await rig.fake.until(lambda: not rig.fake.running, stepping=False)
                return outcome, len(rig.fake.running)
            finally:
                answering.cancel()

    return asyncio.run(main())


def test_no_input_makes_the_server_fail(tmp_path: Path):
    outcome, left = fuzzed(tmp_path, 800)
    assert outcome.wrong == []
    assert left == 0
    answers = outcome.answers
    assert answers.total() >= 800
    taken = [f"{route} 200" for route in BODIES]
    for ending in (*taken, "/v1/completions 400", "/absent 404"):
        assert answers[f"POST {ending}"] > 0, ending
    endings = ("Generate OK", "Generate INVALID_ARGUMENT", "Health/Check OK", "ReflectionInfo OK")
    for ending in endings:
        assert sum(n for answer, n in answers.items() if answer.endswith(ending)) > 0, ending


def test_a_server_that_fails_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Routes, "tokenize", broken)
    outcome, _ = fuzzed(tmp_path, 400)
    assert any("POST /tokenize" in wrong and "internal error" in wrong for wrong in outcome.wrong)


def test_a_servicer_that_fails_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(servicer, "prompt_from", lambda _: 1 / 0)
    outcome, _ = fuzzed(tmp_path, 400)
    assert any("InferenceService" in wrong and "INTERNAL" in wrong for wrong in outcome.wrong)
