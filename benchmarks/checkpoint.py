"""`python -m benchmarks.checkpoint DIR`: a Llama of about 90 million parameters, random weights.

Its shape is that of small published Llamas: head dimension 64, three query heads to each KV head
(SmolLM-135M has nine to three), feed-forward 2.7 times the model dimension, tied embeddings. Random
weights cost the same time as trained ones; the outputs mean nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_COMMON: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": 16384,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
LLAMA_90M: Final = _COMMON | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
"""88.1 million parameters: 75.5 in the layers, 12.6 in the embedding."""

TINY: Final = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
"""As small as it gets, for measuring what is around the model."""


def write_metadata(directory: Path, config: dict[str, Any]) -> None:
    """config.json and a tokenizer: all that a server with `--load-format dummy` needs."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    _tokenizer(config["vocab_size"]).save(str(directory / "tokenizer.json"))


def write_checkpoint(directory: Path, config: dict[str, Any], *, seed: int) -> None:
    """`write_metadata`, and weights from transformers' own initialisation."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(directory)
    write_metadata(directory, config)


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, then made-up words, as a byte-level BPE: decoding them costs what real ones do."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġword{i}" for i in range(vocab_size - len(bytes_))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*bytes_, *words])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_checkpoint(args.directory, LLAMA_90M, seed=args.seed)


if __name__ == "__main__":
    main()
