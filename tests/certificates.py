"""Certificates of an authority that lives as long as a test run."""

import subprocess
from pathlib import Path


class Authority:
    """An authority in `directory`; `ca` is its certificate's file."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.ca = str(directory / f"{name}.pem")
        self._key = str(directory / f"{name}.key")
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", self._key),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-out", self.ca),
        )

    def issue(self, name: str) -> tuple[str, str]:
        """Files of a key and a certificate for 127.0.0.1."""
        path = self._directory / name
        key, request, certificate = (f"{path}.{kind}" for kind in ("key", "csr", "pem"))
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", request),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key),
            *("-CAcreateserial", "-days", "2", "-copy_extensions", "copy", "-out", certificate),
        )
        return key, certificate


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
