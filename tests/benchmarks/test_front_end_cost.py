"""What the front end is compared with when its counters are judged."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from openai_rig import while_serving
from server_rig import MAX_MODEL_LEN, Rig, save_model, serving

from benchmarks import front_end_cost
from benchmarks.uncounted import uncounted
from semipd_jax.client.observations import Histogram, Observations
from semipd_jax.errors import InvalidRequestError
from semipd_jax.text.tokenizer import load_tokenizer


def counts(seen: Observations) -> dict[str, Any]:
    return {
        name: (value.counts, value.sum) if isinstance(value, Histogram) else value
        for name, value in vars(seen).items()
        if name != "clock"
    }


async def serve_all_kinds(rig: Rig) -> None:
    """Requests that end in every way that is counted."""
    await while_serving(rig, rig.client.complete("Hi", max_tokens=5))
    with pytest.raises(InvalidRequestError):
        await rig.client.complete("Hi", temperature=-1)
    events = rig.client.generate("Hi", max_tokens=20, ignore_eos=True)
    await while_serving(rig, anext(events))
    await events.aclose()
    await rig.fake.until(lambda: not rig.fake.running, stepping=False)


@pytest.mark.parametrize("is_counted", [True, False])
def test_the_comparison_serves_and_counts_nothing(tmp_path: Path, is_counted: bool):
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "model").mkdir()
    tokenizer = load_tokenizer(save_model(tmp_path / "model"))

    async def main():
        async with serving(str(tmp_path / "run"), tokenizer) as rig:
            await serve_all_kinds(rig)
            fresh = counts(Observations(MAX_MODEL_LEN))
            assert (counts(rig.engine.observations) != fresh) == is_counted
            assert bool(rig.front_end.gate.calls.ended) == is_counted

    if is_counted:
        asyncio.run(main())
    else:
        with uncounted():
            asyncio.run(main())


@pytest.mark.slow
def test_ratios_are_measured_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "result.json"
    flags = ["--streams", "4", "--output-len", "16", "--repeat", "2", "--json", str(output)]
    front_end_cost.main(flags)
    result = json.loads(output.read_text())
    assert set(result["ratios"]) == {"uncounted", "counted", "with a key, metrics read"}
    assert result["ratios"]["uncounted"] == [1.0, 1.0]
    assert all(ratio > 0 for ratios in result["ratios"].values() for ratio in ratios)
    assert "of uncounted: min" in capsys.readouterr().out
