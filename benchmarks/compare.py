"""The server against transformers: same checkpoint, prompts, output lengths and cores, in turn.

Turns alternate (server, continuous batching, static batch, server, …), so that whatever else the
machine does hits all alike. Prompts are new in every turn: no prefix cache helps anyone.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Final

from benchmarks import common
from benchmarks.load import LoadRun, Send, run_load
from benchmarks.metrics import OK
from benchmarks.transformers_baseline import Baseline, Generated
from benchmarks.workload import PlannedRequest

type Plan = Callable[[int], list[PlannedRequest]]
"""The workload of a seed."""

_TUNING_SEED: Final = 10_000_000
_TUNING_OUTPUT_LEN: Final = 32


@dataclass(frozen=True, slots=True)
class Turn:
    ours: LoadRun
    continuous: Generated
    static: Generated

    @property
    def our_tokens_per_s(self) -> float:
        """Like `Generated.tokens_per_s`: from the first submission to the last token."""
        records = self.ours.records
        seconds = max(r.finished_s for r in records) - min(r.sent_s for r in records)
        return sum(r.num_output_tokens for r in records) / seconds

    @property
    def num_equal_outputs(self) -> int:
        """Requests whose tokens are transformers' own. Greedy outputs may part where two logits
        are all but equal, which random weights make likely."""
        ours = [record.token_ids for record in self.ours.records]
        return sum(a == b for a, b in zip(ours, self.continuous.token_ids, strict=True))


async def take_turns(
    plan: Plan, send: Send, model: str, *, repeat: int, seed: int, timeout_s: float
) -> tuple[dict[int, float], list[Turn]]:
    """Returns output tokens per second of each token budget tried, and the turns.

    Raises:
      RuntimeError: a request failed.
    """
    async with Baseline.start(model, timeout_s=timeout_s) as baseline:
        tuning = [
            [replace(p, output_len=min(p.output_len, _TUNING_OUTPUT_LEN)) for p in plan(s)]
            for s in (_TUNING_SEED, _TUNING_SEED + 1)
        ]
        budgets = await baseline.choose_budget(*tuning)
        await baseline.generate("static", tuning[0])
        await run_load(tuning[0], send, request_timeout_s=timeout_s)
        turns: list[Turn] = []
        for i in range(repeat):
            planned = plan(seed + i)
            ours = await run_load(planned, send, request_timeout_s=timeout_s)
            if failed := [r.status for r in ours.records if r.status != OK]:
                raise RuntimeError(f"{len(failed)} of {len(planned)} requests failed: {failed[0]}")
            continuous = await baseline.generate("continuous", planned)
            static = await baseline.generate("static", planned)
            turns.append(Turn(ours, continuous, static))
        return budgets, turns


def print_comparison(budgets: dict[int, float], turns: Sequence[Turn]) -> None:
    tried = ", ".join(f"{budget}: {speed:.1f}" for budget, speed in budgets.items())
    print(f"\ntransformers' token budgets tried, output tokens/s: {tried}")
    rows = [(name, *common.spread(values)) for name, values in _speeds(turns).items()]
    common.print_table(("", "min", "median", "max"), rows)
    equal = sum(turn.num_equal_outputs for turn in turns)
    print(f"identical outputs: {equal} of {sum(len(t.ours.records) for t in turns)} requests")


def as_json(budgets: dict[int, float], turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "transformers_budgets": budgets,
        "speeds": _speeds(turns),
        "median_ratio": median(_speeds(turns)["ratio to continuous batching"]),
        "num_equal_outputs": [turn.num_equal_outputs for turn in turns],
        "generator": [asdict(turn.ours.health) for turn in turns],
    }


def _speeds(turns: Sequence[Turn]) -> dict[str, list[float]]:
    """One value for each turn."""
    ours = [t.our_tokens_per_s for t in turns]
    continuous = [t.continuous.tokens_per_s for t in turns]
    static = [t.static.tokens_per_s for t in turns]
    return {
        "semipd_jax, output tokens/s": ours,
        "transformers continuous batching": continuous,
        "transformers static batch": static,
        "ratio to continuous batching": [a / b for a, b in zip(ours, continuous, strict=True)],
        "ratio to static batch": [a / b for a, b in zip(ours, static, strict=True)],
    }
