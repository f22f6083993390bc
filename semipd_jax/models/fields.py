"""Reading a model's JSON files with types and limits checked; every refusal names the field."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from semipd_jax.errors import CheckpointError

_MAX_JSON_BYTES: Final = 64 * 2**20
_MAX_INTEGER: Final = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if there is none, or something else."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES} bytes")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; allowed: a JSON object")
    return values


class Fields:
    """Typed access to a JSON object in which null means absent.

    A method without a default requires the field. Every failure is a CheckpointError that names
    the field, its value and what is allowed.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def __contains__(self, name: str) -> bool:
        """Whether the field is there, null included."""
        return name in self._values

    def names(self) -> list[str]:
        return list(self._values)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def integer(
        self,
        name: str,
        default: int | None = None,
        *,
        minimum: int = 1,
        maximum: int = _MAX_INTEGER,
    ) -> int:
        value = self._get(name, default)
        ok = isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum
        self.require(ok, name, f"an integer, {minimum} to {maximum}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers; a single one is a list of one."""
        value = self._get(name, None)
        items = value if isinstance(value, list) else [value]
        ok = all(isinstance(item, int) and not isinstance(item, bool) for item in items)
        self.require(ok, name, "an integer or a list of integers")
        return tuple(items)

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self._get(name, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        self.require(
            ok and math.isfinite(value) and value > above, name, f"a finite number above {above:g}"
        )
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        self.require(isinstance(value, bool), name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        self.require(isinstance(value, str), name, "a string")
        return value

    def texts(self, name: str, default: list[str] | None = None) -> list[str]:
        value = self._get(name, default)
        ok = isinstance(value, list) and all(isinstance(item, str) for item in value)
        self.require(ok, name, "a list of strings")
        return value

    def section(self, name: str) -> "Fields":
        """The nested object; an empty one if it is absent."""
        value = self._get(name, {})
        self.require(isinstance(value, dict), name, "an object")
        return Fields(value, f"{self._where}: {name}")

    def sections(self, name: str) -> list["Fields"]:
        value = self._get(name, None)
        ok = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        self.require(ok, name, "a list of objects")
        return [Fields(item, f"{self._where}: {name}") for item in value]

    def require(self, ok: bool, name: str, allowed: str) -> None:
        """Raises CheckpointError about field `name` unless `ok`."""
        if not ok:
            raise CheckpointError(
                f"{self._where}: {name} is {self._values.get(name)!r}; allowed: {allowed}"
            )

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self._where}: {name} is missing")
        return default
