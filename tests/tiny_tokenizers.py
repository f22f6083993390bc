"""Model directories with a tokenizer small enough to build in every test run."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def decode(self, token_ids):\n    return self.tokens[token_ids]\n" * 3,
    "Grüße aus Köln, naïve café, 日本語のテキスト, 😀 emoji 😃. " * 3,
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_LEVEL_IDS = {
    byte: 2 + i
    for i, byte in enumerate(_SHOWN + [byte for byte in range(256) if byte not in _SHOWN])
}
"""Byte → its token in `byte_level_bpe`: after two special ones, in the order of the characters."""


def byte_level_bpe() -> Tokenizer:
    """As in Llama 3 and Qwen: every byte has a token, no unknown text, a leading <|bos|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=400,
            special_tokens=["<|bos|>", "<|eos|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return tokenizer


def byte_fallback_bpe() -> Tokenizer:
    """As in Llama 2 and Mistral: ▁ for spaces, bytes for characters outside the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?()é\ufffd"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("▁", "▁"), ("i", "n")]
    pieces += ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, **config: object) -> str:
    """Writes tokenizer.json and tokenizer_config.json as a checkpoint ships them."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(directory)


def save_byte_level(directory: Path, **config: object) -> str:
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE}
    return save(byte_level_bpe(), directory, **(settings | config))


def save_byte_fallback(directory: Path, **config: object) -> str:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return save(byte_fallback_bpe(), directory, **(settings | config))
