"""How much host memory may still be used (the machine's, or less if a control group says so), and
how much this process holds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple


class _Version(NamedTuple):
    """Where a version of Linux control groups keeps its numbers."""

    top: str
    limit: str
    usage: str
    cache: str


_V1: Final = _Version(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_V2: Final = _Version("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Linux's MemAvailable, or less where a memory limit that applies to this process leaves less.

    File cache that the kernel can drop counts as available. `root` is where /proc and /sys are.
    """
    meminfo = (root / "proc/meminfo").read_text()
    return max(min([_number("MemAvailable:", meminfo) * 1024, *_left_in_groups(root)]), 0)


def private_bytes(root: Path = Path("/")) -> int:
    """What this process holds for itself: anonymous memory that is resident."""
    return 1024 * _number("RssAnon:", (root / "proc/self/status").read_text())


def _left_in_groups(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _left_on_path(_V2, root, path)
        elif "memory" in controllers.split(","):
            yield from _left_on_path(_V1, root, path)


def _left_on_path(version: _Version, root: Path, path: str) -> Iterator[int]:
    """What is left in the group called `path` and in all those that contain it.

    Inside a container `path` may be the host's, which does not exist here.
    """
    top = root / version.top
    group = top / path.lstrip("/")
    for directory in (group, *group.parents):
        if directory.is_relative_to(top) and (directory / version.limit).exists():
            limit = (directory / version.limit).read_text().strip()
            if limit != "max":
                usage = int((directory / version.usage).read_text())
                cache = _number(version.cache, (directory / "memory.stat").read_text())
                yield int(limit) - usage + cache


def _number(name: str, text: str) -> int:
    found = re.search(rf"^{name}\s+(\d+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the kernel does not report {name}")
    return int(found[1])
