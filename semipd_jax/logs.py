"""Log lines, the same in every process: for a person, or one JSON object each."""

import logging
import sys
from datetime import UTC, datetime
from typing import Literal

import msgspec

type LogFormat = Literal["text", "json"]


def configure(process: str, level: str, form: LogFormat = "text") -> None:
    """Sends this process's log to standard error, each line with time and process name: this
    project's from `level` on, warnings and errors of all other packages."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        text = f"%(asctime)s {process:>20} | %(message)s"
        handler.setFormatter(logging.Formatter(text, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for package in ("semipd_jax", "semipd_server"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())


class JsonFormatter(logging.Formatter):
    """One line: time (UTC, ISO 8601), level, process, logger, message, the record's `fields` if it
    has any and, after a failure, exception. Numbers that JSON does not have are null."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": _unicode(record.getMessage()),
        }
        if fields := getattr(record, "fields", None):
            line["fields"] = fields
        if record.exc_info:
            line["exception"] = _unicode(self.formatException(record.exc_info))
        return msgspec.json.encode(line, enc_hook=str).decode()


def _unicode(text: str) -> str:
    """With escapes for the bytes of file names that are no text."""
    return text.encode(errors="backslashreplace").decode()
