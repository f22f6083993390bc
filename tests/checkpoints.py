"""Tiny random Hugging Face checkpoints of every family, written by transformers."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # models so small that threads would only wait for each other

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa4-llama3-rope-sharded": (
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_parameters": _LLAMA3_ROPE,
            "max_shard_size": "60KB",
        },
    ),
    "llama-mha-tied": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "mistral-window-head-dim-24": ("mistral", {"head_dim": 24, "sliding_window": 40}),
    "qwen2-bias-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-qk-norm-head-dim-32": ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}),
}
"""Name → family and what is special, for parity of the whole engine."""


def write_checkpoint(
    directory: Path,
    family: str,
    *,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Writes config, weights, generation config and a byte-level tokenizer; returns `directory`.

    Every parameter is random, biases and norms included, and large enough that no part of the
    model can be left out unnoticed. The same arguments give the same bytes.
    """
    config_class, model_class = _CLASSES[family]
    config = config_class(**{**_SIZES, **config_overrides})
    model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * (2.0 / parameter.shape[1] ** 0.5))
            else:
                is_norm = bool((parameter == 1).all())
                parameter.copy_(noise * 0.2 + (1.0 if is_norm else 0.0))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    _tokenizer().save_pretrained(directory)
    return directory


def load_reference(directory: Path) -> transformers.PreTrainedModel:
    """The checkpoint in transformers: float32, plain attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@functools.cache
def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte; ids 256 and 257 are <bos> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
