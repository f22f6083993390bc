"""transformers' own generation on the same checkpoint, as a process that answers on pipes.

`Baseline` is the side that asks, `python -m benchmarks.transformers_baseline MODEL` the one that
answers, one JSON line for each. A process of its own is idle while something else is measured.

How continuous batching is configured, and why:
* paged SDPA: paged eager attention takes about three times as long on a CPU;
* the token budget of a step is chosen on this machine from `BUDGETS` by trying each on a workload
  like the measured one: SDPA attends once over all requests of a step, with a mask, so that a large
  budget makes prefill quadratic in the number of requests and a small one makes more steps;
* pages of 64 tokens (16 and 256 make no difference), in a pool just large enough;
* no torch.compile: it needs padded steps, and gains nothing over unpadded ones.
Asynchronous batching and the block-table path are refused on a CPU.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from benchmarks.workload import PlannedRequest

type Method = Literal["continuous", "static"]

BUDGETS: Final = (256, 512, 1024, 2048)
_PAGE_SIZE: Final = 64
_STOP_S: Final = 30.0
_MAX_LINE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Generated:
    """`token_ids` in the order of the requests; `seconds` from submission to the last token."""

    seconds: float
    token_ids: list[list[int]]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.token_ids)) / self.seconds


class Baseline:
    """Asks the process. Every answer is waited for at most `timeout_s`."""

    def __init__(self, process: asyncio.subprocess.Process, timeout_s: float) -> None:
        self._process = process
        self._timeout_s = timeout_s

    @classmethod
    @asynccontextmanager
    async def start(cls, model: str, *, timeout_s: float) -> AsyncGenerator[Self]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.transformers_baseline", model),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
        )
        try:
            yield cls(process, timeout_s)
        finally:
            await _end(process)

    async def choose_budget(
        self, warm_up: Sequence[PlannedRequest], planned: Sequence[PlannedRequest]
    ) -> dict[int, float]:
        """Tries every budget and keeps the best; returns the output tokens per second of each."""
        speeds: dict[int, float] = {}
        for budget in BUDGETS:
            await self._ask({"budget": budget})
            await self.generate("continuous", warm_up)
            speeds[budget] = (await self.generate("continuous", planned)).tokens_per_s
        await self._ask({"budget": max(speeds, key=speeds.__getitem__)})
        return speeds

    async def generate(self, method: Method, planned: Sequence[PlannedRequest]) -> Generated:
        """Everything at once, greedy. A static batch goes on until its longest request is done;
        what others generate beyond their own length does not count."""
        requests = [(p.prompt_token_ids, p.output_len) for p in planned]
        return Generated(**await self._ask({"method": method, "requests": requests}))

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        async with asyncio.timeout(self._timeout_s):
            await self._process.stdin.drain()
            answer = await self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the transformers process ended; see its output above")
        return json.loads(answer)


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


class _Generator:
    """The side that answers. One model for each method, because continuous batching changes the
    attention of the model that it uses."""

    def __init__(self, model: str) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))

        def load() -> Any:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, attn_implementation="sdpa"
            )
            loaded.generation_config.eos_token_id = None
            return loaded.eval()

        self._static_model, self._continuous_model = load(), load()
        self._budget = BUDGETS[-1]
        self._manager: Any = None
        self._num_pages = 0

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if "budget" in question:
            self._budget = question["budget"]
            self._stop()
            return {}
        prompts, lengths = zip(*question["requests"], strict=True)
        if question["method"] == "static":
            return self._static(prompts, lengths)
        return self._continuous(prompts, lengths)

    def _continuous(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> dict[str, Any]:
        self._start(sum(map(len, prompts)) + sum(lengths) + _PAGE_SIZE * len(prompts))
        started = time.perf_counter()
        ids = [
            self._manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                raise RuntimeError("continuous batching ended by itself")
            if result is not None and result.is_finished():
                outputs[result.request_id] = result.generated_tokens
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "token_ids": [outputs[request_id] for request_id in ids]}

    def _static(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> dict[str, Any]:
        """Prompts padded on the left to the longest one."""
        import torch

        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        ids = [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        started = time.perf_counter()
        with torch.inference_mode():
            found = self._static_model.generate(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                max_new_tokens=max(lengths),
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - started
        outputs = found[:, width:].tolist()
        return {
            "seconds": seconds,
            "token_ids": [out[:length] for out, length in zip(outputs, lengths, strict=True)],
        }

    def _start(self, num_tokens: int) -> None:
        """A running manager with room for `num_tokens`; kept from one question to the next."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        num_pages = -(-num_tokens // _PAGE_SIZE)
        if self._manager is not None and num_pages <= self._num_pages:
            return
        self._stop()
        self._num_pages = num_pages
        self._manager = self._continuous_model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE_SIZE, num_blocks=num_pages, max_batch_tokens=self._budget
            ),
        )
        self._manager.start()

    def _stop(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=_STOP_S)
            self._manager.destroy()
            self._manager = None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may get between the answers
    generator = _Generator(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(generator.answer(json.loads(line))), file=answers, flush=True)
    generator._stop()


if __name__ == "__main__":
    main()
