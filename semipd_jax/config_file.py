"""A file of flags: the names of the command line, as YAML.

    model: /models/llama
    max-num-seqs: 64
    share-ladder: [0.5, 0.75, 1.0]

Every value is read as the word it would be on the command line, so both are parsed and checked by
the same code.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from semipd_jax.errors import ConfigError

type FlagKind = Literal["value", "switch", "mark", "repeated"]
"""A switch is true or false. So is a mark, of which the command line can only say that it is true.
Lists are for flags that may be repeated; for others they become one value with commas."""

_MAX_BYTES: Final = 1 << 20
_WORDS: Final[dict[tuple[FlagKind, str], list[str]]] = {
    ("switch", "true"): ["--{}"],
    ("switch", "false"): ["--no-{}"],
    ("mark", "true"): ["--{}"],
    ("mark", "false"): [],
}


def read_words(path: Path, flags: Mapping[str, FlagKind]) -> list[str]:
    """The file's flags as command line words.

    Args:
      flags: those that there are, without dashes in front.

    Raises:
      ConfigError: the file cannot be read, or has a key that is no flag or a value of no use.
    """
    words: list[str] = []
    for key, value in _mapping(path).items():
        name = str(key).replace("_", "-")
        if name not in flags:
            close = difflib.get_close_matches(name, flags, n=1)
            allowed = close or sorted(flags)
            raise ConfigError(f"{path}: {key!r} is no option; allowed: {', '.join(allowed)}")
        for text in _texts(path, name, value, flags[name]):
            if flags[name] in ("value", "repeated"):
                words.append(f"--{name}={text}")
            elif (found := _WORDS.get((flags[name], text.lower()))) is not None:
                words += [word.format(name) for word in found]
            else:
                raise ConfigError(f"{path}: {name} is {text!r}; allowed: true, false")
    return words


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ConfigError(f"{path} is too long; allowed: {_MAX_BYTES} bytes")
        found = yaml.load(text, yaml.BaseLoader)  # all scalars are strings, nothing is constructed
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} has no options; allowed: lines of 'name: value'")
    return found


def _texts(path: Path, name: str, value: Any, kind: FlagKind) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(text, str) and text for text in values):
        raise ConfigError(f"{path}: {name} is {value!r}; allowed: a value, or a list of values")
    return values if kind == "repeated" else [",".join(values)]
