"""The page of `/dashboard`: one file, and nothing that its policy does not name."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

_PAGE: Final = "dashboard.html"


def load_dashboard() -> tuple[bytes, dict[str, str]]:
    """The page and its headers: browsers run its own script and style, by their hashes, and no
    other, and talk to nobody but this server."""
    page = (files("semipd_server") / _PAGE).read_bytes()
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of('script', page)}",
            f"style-src {_hash_of('style', page)}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    return page, {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def _hash_of(tag: str, page: bytes) -> str:
    [text] = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
