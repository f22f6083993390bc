"""Log lines a person can read, the same in every process."""

import logging
import sys


def configure(process: str, level: str) -> None:
    """Sends this process's log to standard error, each line with time and process name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {process:>20} | %(message)s", "%H:%M:%S"))
    for package in ("semipd_jax", "semipd_server"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
