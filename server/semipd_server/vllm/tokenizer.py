"""The tokenizer of the model as a gateway fetches it: a zip of the files that describe it."""

import hashlib
import io
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

from smg_grpc_proto.generated import common_pb2 as pb

_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt"),
    *("config.json", "generation_config.json"),
)
_CHUNK_BYTES: Final = 1 << 16
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the same files make the same zip


@lru_cache(maxsize=1)
def tokenizer_zip(directory: str) -> bytes:
    """Those of the files that a tokenizer may consist of that are there."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (Path(directory) / name for name in _FILES):
            if path.is_file():
                entry = zipfile.ZipInfo(path.name, _EPOCH)
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def chunks(data: bytes) -> Iterator[pb.GetTokenizerChunk]:
    """The data in pieces; the last one brings the hash of all."""
    digest = hashlib.sha256(data).hexdigest()
    for start in range(0, len(data), _CHUNK_BYTES):
        piece = data[start : start + _CHUNK_BYTES]
        is_last = start + _CHUNK_BYTES >= len(data)
        yield pb.GetTokenizerChunk(data=piece, sha256=digest if is_last else "")
