"""The demo model's tokenizer: byte-level BPE whose pieces suit Python source."""

from collections.abc import Iterable
from typing import Any, Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT: Final = "<|endoftext|>"

_PIECES: Final = r"\n+| {2,}|[ _.]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+"
"""Line ends, then runs of spaces (an indentation is one piece), words with the one space, dot or
underscore before them, single digits, punctuation. No piece spans a line end and what follows, so
a prompt may stop at either."""

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}\n"
    "{% else %}# {{ message.content | replace('\n', '\n# ') }}\n"
    "{% endif %}{% endfor %}"
)
"""The model knows source only: what system and user say becomes a comment, an answer is code."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """`END_OF_TEXT` is id 0; `encode` puts it before every text, as the training windows do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, 0)],
    )
    return tokenizer


def tokenizer_config(max_model_len: int) -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_model_len,
        "chat_template": CHAT_TEMPLATE,
    }
