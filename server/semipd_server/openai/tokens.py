"""What single tokens stand for, byte by byte: text alone cannot show half a character."""

import codecs
from collections.abc import Sequence
from typing import Final

from tokenizers import decoders, pre_tokenizers

from semipd_jax.text.tokenizer import Tokenizer


def _byte_level_alphabet() -> dict[str, int]:
    """Character → the byte it stands for in byte-level vocabularies (GPT-2's table): printable
    Latin-1 characters are their own bytes, the rest follow from U+0100 in order."""
    characters = set(pre_tokenizers.ByteLevel.alphabet())
    own = {c: ord(c) for c in characters if ord(c) < 0x100}
    others = sorted(set(range(0x100)) - set(own.values()))
    return own | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET: Final = _byte_level_alphabet()


class TokenTexts:
    """Bytes and text of every token, worked out when first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._bytes = {token_id: bytes((b,)) for b, token_id in tokenizer.byte_ids.items()}
        added = tokenizer.backend.get_added_tokens_decoder()
        self._bytes |= {token_id: token.content.encode() for token_id, token in added.items()}
        self._is_byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)

    def bytes_of(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(self._backend.id_to_token(token_id) or "")
        return found

    def text_of(self, token_id: int) -> str:
        """With U+FFFD for what is no whole character."""
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def texts_of(self, token_ids: Sequence[int]) -> list[str]:
        return [self.text_of(token_id) for token_id in token_ids]

    def name_of(self, token_id: int) -> str:
        """The text, or OpenAI's spelling of bytes that are no whole character: such tokens would
        all be called U+FFFD."""
        spelled = self.bytes_of(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _spell(self, piece: str) -> bytes:
        if self._is_byte_level and all(c in _ALPHABET for c in piece):
            return bytes(_ALPHABET[c] for c in piece)
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


class TextOffsets:
    """How many characters come before each token of a sequence."""

    def __init__(self, texts: TokenTexts, start: int) -> None:
        self._texts = texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = start

    def push(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._utf8.decode(self._texts.bytes_of(token_id)))
        return offset
