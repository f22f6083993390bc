"""Hugging Face transformers as the judge: greedy tokens and their log-probabilities."""

from pathlib import Path

import torch
from checkpoints import load_reference


class Reference:
    def __init__(self, directory: Path) -> None:
        self._model = load_reference(directory)

    @torch.no_grad()
    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """The next `num_tokens` tokens, whatever they are, and the log-probability of each."""
        tokens: list[int] = []
        logprobs: list[float] = []
        new, past = torch.tensor([prompt]), None
        for _ in range(num_tokens):
            output = self._model(new, past_key_values=past, use_cache=True)
            past = output.past_key_values
            scores = torch.log_softmax(output.logits[0, -1].float(), dim=-1)
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            new = torch.tensor([[tokens[-1]]])
        return tokens, logprobs
