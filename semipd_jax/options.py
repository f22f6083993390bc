"""Flat option names ↔ the nested configuration: one table for flags and library arguments.

Names are those that vLLM users know, where vLLM has the option.
"""

import argparse
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Final

from semipd_jax import config
from semipd_jax.config import EngineConfig, require
from semipd_jax.tuner import setup


@dataclass(frozen=True, slots=True)
class Option:
    """`section` and `field` say where in EngineConfig the value goes; section "" is the top."""

    name: str
    section: str
    field: str
    help: str


OPTIONS: Final = (
    Option("mode", "", "mode", "how prefill and decode share the device; the others are baselines"),
    Option("device", "", "device", "where to run"),
    Option("tokenizer", "model", "tokenizer", "directory of the tokenizer [the model's]"),
    Option("served_model_name", "model", "served_name", "name that clients see [the directory's]"),
    Option("dtype", "model", "dtype", "of weights, activations and KV"),
    Option(
        "max_model_len", "model", "max_model_len", "most tokens of a request, prompt and output"
    ),
    Option("load_format", "model", "load_format", "how weights are stored; dummy: random weights"),
    Option("seed", "model", "seed", "of dummy weights and of requests without a seed"),
    Option("block_size", "cache", "page_size", "tokens per KV page [16 on a CPU, 64 on a GPU]"),
    Option("kv_cache_memory_bytes", "cache", "memory_bytes", "size of the KV pool [by memory]"),
    Option(
        "gpu_memory_utilization",
        "cache",
        "gpu_memory_utilization",
        "fraction of the GPU's memory that may be in use",
    ),
    Option(
        "enable_prefix_caching",
        "cache",
        "enable_prefix_caching",
        "keep full pages for requests that begin with the same tokens",
    ),
    Option("max_num_seqs", "scheduler", "max_num_seqs", "most requests running at once"),
    Option(
        "max_num_batched_tokens",
        "scheduler",
        "max_num_batched_tokens",
        "most prompt tokens in one prefill step",
    ),
    Option(
        "max_num_queued_reqs",
        "scheduler",
        "max_num_queued_reqs",
        "most requests waiting before new ones are refused",
    ),
    Option(
        "max_num_queued_tokens",
        "scheduler",
        "max_num_queued_tokens",
        "most prompt tokens to compute before new requests are refused [no limit]",
    ),
    Option(
        "scheduling_policy",
        "scheduler",
        "policy",
        "order of prefills of one priority: of arrival, or shortest remainder first",
    ),
    Option(
        "ageing_tokens_per_s",
        "scheduler",
        "ageing_tokens_per_s",
        "spf: a second of waiting counts as this many tokens less to compute",
    ),
    Option("prefill_share", "shares", "prefill", "fraction of the compute that prefill may use"),
    Option("decode_share", "shares", "decode", "fraction of the compute that decode may use"),
    Option(
        "share_ladder",
        "shares",
        "ladder",
        "further shares to keep warm workers at, for instance 0.6,0.8,1.0",
    ),
    Option("prefill_share_ladder", "shares", "prefill_ladder", "the same for prefill alone"),
    Option("decode_share_ladder", "shares", "decode_ladder", "the same for decode alone"),
    Option("policy", "tuner", "policy", "who chooses the shares while requests flow"),
    Option("slo_ttft_ms", "tuner", "slo_ttft_ms", "promised time to the first token [nothing]"),
    Option(
        "slo_tpot_ms", "tuner", "slo_tpot_ms", "promised mean time of the tokens after it [nothing]"
    ),
    Option(
        "slo_classes",
        "tuner",
        "slo_classes",
        "other promises, priority:ttft_ms:tpot_ms,... such as 5:2000:100,9::200",
    ),
    Option("slo_target", "tuner", "slo_target", "share of requests that should meet both"),
    Option(
        "tuner_profile",
        "tuner",
        "profile",
        "step times on this device, from python -m semipd_jax.profile; predictive needs it",
    ),
    Option("mps", "shares", "mps", "share a GPU's compute through NVIDIA MPS"),
    Option("startup_timeout", "timeouts", "startup_s", "seconds until the engine must be ready"),
    Option("step_timeout", "timeouts", "step_s", "seconds until a worker counts as hung"),
    Option(
        "shutdown_timeout",
        "timeouts",
        "shutdown_s",
        "seconds that running requests get to finish at the end",
    ),
    Option(
        "compile_cache_dir",
        "",
        "compile_cache_dir",
        "directory of compiled programs [$XDG_CACHE_HOME/semipd_jax or ~/.cache/semipd_jax]",
    ),
    Option("log_level", "", "log_level", "how much is logged"),
    Option("log_format", "", "log_format", "lines for a person, or one JSON object each"),
)

_SECTIONS: Final[dict[str, type]] = {
    "model": config.ModelConfig,
    "cache": config.CacheConfig,
    "scheduler": config.SchedulerConfig,
    "shares": config.ShareConfig,
    "tuner": config.TunerConfig,
    "timeouts": config.TimeoutConfig,
    "": EngineConfig,
}


def build_config(model: str, **options: Any) -> EngineConfig:
    """The configuration for flat options by name; absent ones keep their defaults.

    Raises:
      ConfigError: an option is unknown or its value is not allowed.
    """
    by_name = {option.name: option for option in OPTIONS}
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    sections["model"]["path"] = model
    for name, value in options.items():
        require(name in by_name, "option", name, ", ".join(sorted(by_name)))
        option = by_name[name]
        _check_type(option, value)
        if isinstance(value, int) and value_type(option) is float:
            value = float(value)
        sections[option.section][option.field] = value
    top = sections.pop("")
    made = EngineConfig(**{s: _SECTIONS[s](**values) for s, values in sections.items()}, **top)
    setup.check(made)
    return made


def add_flags(parser: argparse.ArgumentParser, wanted: Iterable[Option]) -> None:
    """Adds a flag for each option. Those that are not given are absent from the result."""
    for option in wanted:
        flag: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.help}
        if value_type(option) is bool:
            flag["action"] = argparse.BooleanOptionalAction
        else:
            flag |= {"type": parse(option), "choices": choices(option)}
        parser.add_argument("--" + option.name.replace("_", "-"), **flag)


def choices(option: Option) -> tuple[str, ...] | None:
    """The values of an option that takes one of a few words."""
    literal = getattr(_annotation(option), "__value__", None)
    return typing.get_args(literal) if literal is not None else None


def value_type(option: Option) -> type:
    """bool, int, float, str or tuple (of numbers)."""
    if choices(option) is not None:
        return str
    annotation = _annotation(option)
    kind = annotation
    if isinstance(annotation, UnionType):
        kind = next(t for t in typing.get_args(annotation) if t is not NoneType)
    return typing.get_origin(kind) or kind


def parse(option: Option) -> Callable[[str], Any]:
    """What makes a value of a word on the command line, or raises ValueError."""
    kind = value_type(option)
    return numbers if kind is tuple else kind


def numbers(text: str) -> tuple[float, ...]:
    """For instance 0.6,0.8,1.0."""
    return tuple(float(word) for word in text.split(","))


def default(option: Option) -> Any:
    field = next(f for f in fields(_SECTIONS[option.section]) if f.name == option.field)
    return None if field.default is MISSING else field.default


def _annotation(option: Option) -> Any:
    return typing.get_type_hints(_SECTIONS[option.section])[option.field]


def _check_type(option: Option, value: object) -> None:
    words = choices(option)
    if words is not None:
        require(value in words, option.name, value, ", ".join(words))
        return
    kind = value_type(option)
    if kind is tuple:
        is_right = isinstance(value, tuple) and all(_is_number(n) for n in value)
        allowed = "a tuple of numbers"
    else:
        is_right = _is_number(value) if kind is float else type(value) is kind
        allowed = f"a value of type {kind.__name__}"
    is_unset = value is None and default(option) is None
    require(is_unset or is_right, option.name, value, allowed)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
