"""Text to token ids and back, with the tokenizer of a model directory.

transformers reads the directory (its rules for special tokens, its sandbox for chat templates); the
Rust tokenizer underneath does the work, because it may be called from several threads at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers
from jinja2 import TemplateError

from semipd_jax.errors import CheckpointError, InvalidRequestError
from semipd_jax.text.chat_template import OutputTooLongError, render

type ChatMessage = Mapping[str, str]
"""{"role": …, "content": …}, and for some templates {"name": …}"""

_MAX_CHAT_CHARS: Final = 1 << 24
_TEMPLATE_S: Final = 10.0


class Tokenizer:
    """Immutable after construction and safe to call from any thread.

    Args:
      wrapped: a transformers PreTrainedTokenizerFast, which nobody else uses.

    Attributes:
      size: one more than the largest token id.
      unknown_ids: ids below `size` that stand for nothing.
      skipped_ids: ids that leave no text with `skip_special_tokens`.
      byte_ids: byte → its token `<0xNN>`; empty unless unknown characters are spelled in such.
      high_bytes: token id → byte, of the bytes that only with others make a character.
    """

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self.backend: tokenizers.Tokenizer = wrapped.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        known_ids = set(self.backend.get_vocab().values())
        added = self.backend.get_added_tokens_decoder()
        special_ids = {token_id for token_id, token in added.items() if token.special}
        self.size = max(known_ids) + 1
        self.unknown_ids = frozenset(range(self.size)) - known_ids
        self.skipped_ids = self.unknown_ids | special_ids
        self.byte_ids: Mapping[int, int] = _byte_ids(self.backend)
        self.high_bytes = {i: byte for byte, i in self.byte_ids.items() if byte >= 0x80}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Text that spells a special token gives that token.

        Releases the interpreter lock while it works: run long texts in a thread.
        """
        return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def render_chat(
        self, messages: Sequence[ChatMessage], *, max_chars: int = _MAX_CHAT_CHARS
    ) -> str:
        """The conversation in the model's own format, ready for the assistant's answer.

        Raises:
          InvalidRequestError: there is no chat template, it refuses these messages, or it writes
            more than `max_chars` or takes too long.
        """
        if self._wrapped.chat_template is None:
            raise InvalidRequestError("the model has no chat template", field="chat")
        try:
            return self._render(messages, max_chars)
        except OutputTooLongError as error:
            raise InvalidRequestError(
                f"the model's chat template makes more than {max_chars} characters of these "
                "messages, the most allowed",
                field="chat",
                is_too_long=True,
            ) from error
        except Exception as error:
            known = isinstance(error, (TemplateError, ValueError, TypeError))
            what = f"refuses these messages: {error}" if known else "fails on these messages"
            if isinstance(error, TimeoutError):
                what = f"takes longer than {_TEMPLATE_S:.0f} s for these messages"
            raise InvalidRequestError(f"the model's chat template {what}", field="chat") from error

    def _render(self, messages: Sequence[ChatMessage], max_chars: int) -> str:
        """As transformers' `apply_chat_template` does it, which has no bounds."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = _compile_jinja_template(self._wrapped.get_chat_template())
        variables = {
            **self._wrapped.special_tokens_map,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        return render(template, variables, max_chars=max_chars, timeout_s=_TEMPLATE_S)

    def encode_chat(
        self, messages: Sequence[ChatMessage], *, max_chars: int = _MAX_CHAT_CHARS
    ) -> list[int]:
        """Token ids of `render_chat`, whose template already writes the special tokens."""
        text = self.render_chat(messages, max_chars=max_chars)
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids that the tokenizer does not know are left out."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)


def _byte_ids(backend: tokenizers.Tokenizer) -> dict[int, int]:
    ids = {byte: backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    known = {byte: token_id for byte, token_id in ids.items() if token_id is not None}
    works = len(known) == 256 and backend.decode([known[ord("a")]]) == "a"
    return known if works else {}


def require_tokenizer(directory: str) -> None:
    """Raises CheckpointError if there is no tokenizer.json."""
    if not (Path(directory) / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{directory} has no tokenizer.json; save one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def load_tokenizer(directory: str) -> Tokenizer:
    """Reads tokenizer.json and what lies beside it. Never runs code from the directory.

    Raises:
      CheckpointError: there is no tokenizer.json, or it cannot be read.
    """
    require_tokenizer(directory)
    from transformers import PreTrainedTokenizerFast  # half a second, and only this needs it

    try:
        wrapped = PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust parser raises bare Exception
        raise CheckpointError(f"cannot read the tokenizer in {directory}: {error}") from error
    return Tokenizer(wrapped)
