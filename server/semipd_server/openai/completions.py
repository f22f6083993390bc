"""/v1/completions: text in, text out."""

import asyncio
from collections.abc import Sequence
from typing import cast

from semipd_jax.client import EngineClient, Prompt
from semipd_jax.request import TokenLogprob
from semipd_server.gate import Engine
from semipd_server.openai.answer import Answer
from semipd_server.openai.choices import choices
from semipd_server.openai.errors import bad_request
from semipd_server.openai.schema import CompletionChoice, CompletionLogprobs, CompletionRequest
from semipd_server.openai.tokens import TextOffsets, TokenTexts


class CompletionFormat:
    """An `answer.Format`.

    Args:
      echoes: text that comes before each choice.
      with_logprobs: whether they were asked for.
    """

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, texts: TokenTexts, echoes: Sequence[str], *, with_logprobs: bool) -> None:
        self._texts = texts
        self._echoes = echoes
        self._offsets = (
            [TextOffsets(texts, len(echo)) for echo in echoes] if with_logprobs else None
        )

    def opening(self, index: int) -> CompletionChoice | None:
        echo = self._echoes[index]
        return CompletionChoice(index, echo) if echo else None

    def chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> CompletionChoice:
        return CompletionChoice(index, text, self._logprobs(index, logprobs))

    def closing(
        self, index: int, finish_reason: str, stop_reason: str | int | None
    ) -> CompletionChoice:
        return CompletionChoice(index, "", None, finish_reason, stop_reason)

    def whole(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish_reason: str,
        stop_reason: str | int | None,
    ) -> CompletionChoice:
        found = self._logprobs(index, logprobs)
        text = self._echoes[index] + text
        return CompletionChoice(index, text, found, finish_reason, stop_reason)

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        if self._offsets is None:
            return None
        name, offsets = self._texts.name_of, self._offsets[index]
        return CompletionLogprobs(
            tokens=[name(p.token_id) for p in logprobs],
            token_logprobs=[p.logprob for p in logprobs],
            # The sampled token last, so that it wins over one with the same text.
            top_logprobs=[
                {name(i): value for i, value in (*p.top, (p.token_id, p.logprob))} for p in logprobs
            ],
            text_offset=[offsets.push(p.token_id) for p in logprobs],
        )


async def complete(engine: Engine, texts: TokenTexts, request: CompletionRequest) -> Answer:
    """Raises ApiError or an EngineError if the request can never succeed."""
    if request.echo and request.logprobs is not None:
        raise bad_request("echo is true; allowed: false with logprobs", "echo")
    prompts = _prompts(request)
    special = request.add_special_tokens
    token_ids: list[tuple[int, ...]] = []
    for prompt in prompts:
        token_ids.append(await engine.client.encode(prompt, add_special_tokens=special))
        await asyncio.sleep(0)  # each alone is quick, so it was done at once
    options = {"max_tokens": request.max_tokens, "logprobs": request.logprobs}
    wanted = await choices(engine, token_ids, request, **options)
    echoes = [""] * len(prompts)
    if request.echo:
        echoes = [await _text(engine.client, prompt) for prompt in prompts]
    form = CompletionFormat(
        texts,
        [echoes[wanted.prompt_of(index)] for index in range(len(wanted))],
        with_logprobs=request.logprobs is not None,
    )
    return Answer(engine, form, wanted, request.stop_token_ids or ())


def _prompts(request: CompletionRequest) -> list[Prompt]:
    """One text, one list of token ids, or many of either kind."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(entry) for entry in prompt}
    if kinds == {int}:
        return [cast(list[int], prompt)]
    if kinds not in ({str}, {list}):
        raise bad_request(
            f"prompt is {prompt!r:.80}; allowed: a string, token ids, or a list of one of them",
            "prompt",
        )
    return cast(list[Prompt], prompt)


async def _text(client: EngineClient, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    await asyncio.sleep(0)  # each alone is quick, so it is done at once
    return await client.decode(cast(list[int], prompt), skip_special_tokens=False)
