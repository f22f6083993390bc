import asyncio
from pathlib import Path

import pytest
import torch
from checkpoints import load_reference, write_checkpoint

from benchmarks import transformers_baseline
from benchmarks.transformers_baseline import Baseline
from benchmarks.workload import PlannedRequest, fixed

LENGTHS = ((5, 9), (40, 3), (17, 6))  # prompt, output


@pytest.mark.slow
def test_both_methods_generate_what_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and outputs of different lengths: padding must not change a token."""
    monkeypatch.setattr(transformers_baseline, "BUDGETS", (64, 16))
    model = str(write_checkpoint(tmp_path, "llama"))
    planned = [
        request
        for n, k in LENGTHS
        for request in fixed([0.0], input_len=n, output_len=k, vocab_size=320, seed=n)
    ]
    continuous, static, speeds = asyncio.run(_generate(model, planned))
    assert continuous == static == _reference(tmp_path, planned)
    assert [len(ids) for ids in continuous] == [k for _, k in LENGTHS]
    assert speeds.keys() == {64, 16}
    assert min(speeds.values()) > 0


async def _generate(
    model: str, planned: list[PlannedRequest]
) -> tuple[list[list[int]], list[list[int]], dict[int, float]]:
    async with Baseline.start(model, timeout_s=120) as baseline:
        speeds = await baseline.choose_budget(planned, planned)
        continuous = await baseline.generate("continuous", planned)
        static = await baseline.generate("static", planned)
    return continuous.token_ids, static.token_ids, speeds


def _reference(directory: Path, planned: list[PlannedRequest]) -> list[list[int]]:
    model = load_reference(directory)
    outputs: list[list[int]] = []
    for request in planned:
        ids = list(request.prompt_token_ids)
        for _ in range(request.output_len):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        outputs.append(ids[len(request.prompt_token_ids) :])
    return outputs
