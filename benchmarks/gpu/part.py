"""A part of the GPU check. Each runs in a process of its own, which never uses the device itself.

python -m benchmarks.gpu.part benchmarks.gpu.storage RESULT '{"platform": "cuda", …}'
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.peers import PeerError
from semipd_jax.config import Platform
from semipd_jax.errors import EngineError


@dataclass(frozen=True, slots=True)
class Setting:
    """Where parts run. On a CPU they rehearse: the same code on host memory and cores, small.

    Attributes:
      name: of the device.
      num_sms: of the whole device; 0 on a CPU.
    """

    platform: Platform
    name: str
    num_sms: int

    @property
    def is_rehearsal(self) -> bool:
        return self.platform == "cpu"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a part found: in words, each naming what was expected, and as data."""

    passed: bool
    found: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)


def main(module: str, path: str, setting: str) -> None:
    """Runs a part's `run`; what keeps it from running is its outcome, in one line."""
    try:
        outcome = import_module(module).run(Setting(**json.loads(setting)))
    except ModuleNotFoundError as error:
        outcome = Outcome(False, (f"missing: the Python package {error.name}",))
    except (EngineError, PeerError) as error:
        outcome = Outcome(False, (str(error),))
    Path(path).write_text(json.dumps(asdict(outcome), default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
