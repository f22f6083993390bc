"""What an engine is configured with: frozen, nested, validated once, passed explicitly.

`EngineConfig` is what a user chooses; every child process receives it as JSON. Sizes that follow
from the machine or the model (pages in the pool, model length) are resolved by the memory owner
and travel in `messages.MemoryLayout`, never by changing the config.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from semipd_jax.errors import ConfigError
from semipd_jax.logs import LogFormat

type LoadFormat = Literal["auto", "safetensors", "orbax", "dummy"]
type Dtype = Literal["auto", "float32", "bfloat16", "float16"]
type Platform = Literal["cpu", "cuda"]
type Device = Literal["auto", "cpu", "cuda"]
type MpsMode = Literal["auto", "on", "off"]
type SchedulingPolicy = Literal["fcfs", "spf"]
type SharePolicy = Literal["static", "semi-pd", "semi-pd-replan", "predictive"]
type PolicyChoice = Literal["auto", "static", "semi-pd", "semi-pd-replan", "predictive"]
type LogLevel = Literal["debug", "info", "warning", "error"]
type Mode = Literal["semi-pd", "colocated", "chunked"]
type Phase = Literal["prefill", "decode"]
type Lane = Phase | Literal["colocated", "chunked"]
"""Steps that run one after another, in workers of their own: of a phase, or of both."""

PHASES: Final[tuple[Phase, ...]] = ("decode", "prefill")
"""In the order of planning: decode may preempt requests for pages, what it leaves is prefill's."""

LANES: Final[Mapping[Mode, tuple[Lane, ...]]] = {
    "semi-pd": PHASES,
    "colocated": ("colocated",),
    "chunked": ("chunked",),
}

POLICIES: Final = get_args(SharePolicy.__value__)

MAX_WORKERS: Final = 48
"""Clients that MPS takes on one GPU from Volta on, by the guides up to driver 550; later ones say
60. Each worker is one, and nothing else of an engine is."""


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises ConfigError naming the field, the value and what is allowed, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")


def require_share(name: str, share: float) -> None:
    """Raises ConfigError unless `share` is a fraction of the device's compute."""
    require(0.0 < share <= 1.0, name, share, "above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model is served and how its weights are read.

    Attributes:
      path: Hugging Face or Orbax model directory.
      tokenizer: directory of the tokenizer; None means `path`.
      served_name: name that clients see; None means the directory's name.
      dtype: of weights, activations and KV; "auto" is the checkpoint's on a GPU, float32 on a CPU.
      max_model_len: most tokens (prompt + output) of one request; None means the model's own limit.
      load_format: "auto" recognises safetensors and Orbax; "dummy" makes seeded random weights.
      seed: of dummy weights, and of sampling for requests that bring no seed of their own.
    """

    path: str
    tokenizer: str | None = None
    served_name: str | None = None
    dtype: Dtype = "auto"
    max_model_len: int | None = None
    load_format: LoadFormat = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self.max_model_len is None or self.max_model_len >= 2,
            "max_model_len",
            self.max_model_len,
            "at least 2, or unset",
        )
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer or self.path

    @property
    def name(self) -> str:
        return self.served_name or Path(self.path).resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The KV pool.

    Attributes:
      page_size: tokens per page; None means what suits the device.
      memory_bytes: size of the pool; None lets the memory owner choose.
      gpu_memory_utilization: fraction of a GPU's memory that may be in use by all together.
      enable_prefix_caching: full pages are kept for requests that begin with the same tokens.
    """

    page_size: int | None = None
    memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        require(
            self.page_size in (None, 16, 32, 64, 128),
            "page_size",
            self.page_size,
            "16, 32, 64, 128, or unset",
        )
        require(
            self.memory_bytes is None or self.memory_bytes > 0,
            "memory_bytes",
            self.memory_bytes,
            "a positive number of bytes, or unset",
        )
        require(
            0.0 < self.gpu_memory_utilization <= 1.0,
            "gpu_memory_utilization",
            self.gpu_memory_utilization,
            "above 0 and at most 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of the queue, and the order of prefills.

    Attributes:
      max_num_seqs: most requests that hold a row (prefill and decode together).
      max_num_batched_tokens: most prompt tokens in one prefill step (the chunk budget).
      max_num_queued_reqs: most requests waiting for a row before new ones are refused.
      max_num_queued_tokens: most prompt tokens that wait or are under way before new requests are
        refused (about the TTFT to keep, times the tokens/s of prefill); None is no limit.
      policy: within a priority class, "fcfs" prefills in the order of arrival, "spf" the shortest
        remainder first.
      ageing_tokens_per_s: under "spf", a second of waiting counts as this many tokens less to
        compute. A prompt of n tokens is passed only by what arrives within n / this many seconds.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int | None = None
    policy: SchedulingPolicy = "fcfs"
    ageing_tokens_per_s: float = 2000.0

    def __post_init__(self) -> None:
        require(1 <= self.max_num_seqs <= 4096, "max_num_seqs", self.max_num_seqs, "1 to 4096")
        require(
            16 <= self.max_num_batched_tokens <= 65536,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            "16 to 65536",
        )
        require(
            self.max_num_queued_reqs >= 1,
            "max_num_queued_reqs",
            self.max_num_queued_reqs,
            "at least 1",
        )
        require(
            self.max_num_queued_tokens is None or self.max_num_queued_tokens >= 1,
            "max_num_queued_tokens",
            self.max_num_queued_tokens,
            "at least 1, or unset",
        )
        require(
            0 < self.ageing_tokens_per_s < math.inf,
            "ageing_tokens_per_s",
            self.ageing_tokens_per_s,
            "a positive number",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareConfig:
    """Fraction of the device's compute that each phase may use; they may add up to more than 1.

    Attributes:
      prefill, decode: the shares at the start, while both phases have work.
      ladder: further shares at which both phases keep a warm worker, so that a phase can move to
        one of them between two steps.
      prefill_ladder, decode_ladder: the same for one phase; None means `ladder`.
      mps: whether a GPU's compute is shared through NVIDIA MPS, without which it cannot be limited.
        "auto" warns if there is none, "on" refuses to start.
    """

    prefill: float = 1.0
    decode: float = 1.0
    ladder: tuple[float, ...] = ()
    prefill_ladder: tuple[float, ...] | None = None
    decode_ladder: tuple[float, ...] | None = None
    mps: MpsMode = "auto"

    def __post_init__(self) -> None:
        for name, value in (("prefill_share", self.prefill), ("decode_share", self.decode)):
            require_share(name, value)
        ladders = (
            ("share_ladder", self.ladder),
            *(
                (f"{phase}_share_ladder", ladder or ())
                for phase, ladder in (
                    ("prefill", self.prefill_ladder),
                    ("decode", self.decode_ladder),
                )
            ),
        )
        for name, ladder in ladders:
            for value in ladder:
                require_share(name, value)
        require(
            self.max_num_workers <= MAX_WORKERS,
            "share_ladder",
            self.ladder,
            f"shares that make at most {MAX_WORKERS} workers: one per phase and share, and one per "
            f"phase beside the ladder; with prefill_share_ladder {self.prefill_ladder} and "
            f"decode_share_ladder {self.decode_ladder} these make {self.max_num_workers}",
        )

    @property
    def max_num_workers(self) -> int:
        """One per rung and phase, and one per phase at a share off its ladder."""
        return sum(len(self.rungs(phase)) + 1 for phase in ("prefill", "decode"))

    def share(self, lane: Lane) -> float:
        """The share of a lane at the start; one with both phases has all compute."""
        return {"prefill": self.prefill, "decode": self.decode}.get(lane, 1.0)

    def rungs(self, lane: Lane) -> tuple[float, ...]:
        """The shares of a lane whose workers are kept warm, smallest first."""
        own = {"prefill": self.prefill_ladder, "decode": self.decode_ladder}.get(lane)
        return tuple(sorted({self.share(lane), *(self.ladder if own is None else own)}))


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerConfig:
    """Who chooses the shares while requests flow, and what latency is promised.

    Attributes:
      policy: "auto" is "predictive" if there is a `profile` to predict by, else "static", which
        keeps the shares. "semi-pd" and "semi-pd-replan" move them after every window
        of finished requests, as the paper and its authors' code do. "predictive" chooses them
        before every step, by the step times of `profile`.
      slo_ttft_ms, slo_tpot_ms: promised to every request; None promises nothing.
      slo_classes: what is promised to single priorities instead, see `tuner.slo.parse_classes`.
      slo_target: the share of requests that should meet both.
      profile: file made by `python -m semipd_jax.profile` on this device with this model.
    """

    policy: PolicyChoice = "auto"
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    slo_classes: str = ""
    slo_target: float = 0.9
    profile: str | None = None

    def __post_init__(self) -> None:
        for name in ("slo_ttft_ms", "slo_tpot_ms"):
            value = getattr(self, name)
            ok = value is None or 0 < value < math.inf
            require(ok, name, value, "a positive number of milliseconds, or unset")
        require(0 < self.slo_target < 1, "slo_target", self.slo_target, "between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutConfig:
    """Seconds after which a wait is a failure.

    Attributes:
      startup_s: from launch until every process is ready.
      step_s: a worker that holds a step longer than this is hung and is replaced.
      shutdown_s: running requests may finish for this long after the stop was asked for.
    """

    startup_s: float = 600.0
    step_s: float = 120.0
    shutdown_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("startup_s", "step_s"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "a positive number of seconds")
        require(0 <= self.shutdown_s < math.inf, "shutdown_s", self.shutdown_s, "0 or more seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to know.

    Attributes:
      mode: "semi-pd" runs prefill and decode at the same time, each in a worker of its own. The
        others are what it is compared with, and have one worker for both: "colocated" runs prefill
        steps while there are any, then decode steps; "chunked" puts prompt tokens into decode
        steps, up to `max_num_batched_tokens` tokens in all (Sarathi-Serve, arXiv 2403.02310).
      device: where workers run; "auto" is a GPU if there is one that can be used.
      compile_cache_dir: directory of compiled programs; None means $XDG_CACHE_HOME/semipd_jax or
        ~/.cache/semipd_jax.
      log_level: what child processes write to standard error.
      log_format: lines for a person, or JSON objects.
    """

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    shares: ShareConfig = field(default_factory=ShareConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)
    mode: Mode = "semi-pd"
    device: Device = "auto"
    compile_cache_dir: str | None = None
    log_level: LogLevel = "warning"
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        if self.mode != "semi-pd":
            self._require_no_shares()
        limits = self.scheduler
        require(
            self.mode != "chunked" or limits.max_num_batched_tokens > limits.max_num_seqs,
            "max_num_batched_tokens",
            limits.max_num_batched_tokens,
            f"more than max_num_seqs ({limits.max_num_seqs}) with mode 'chunked', whose steps take "
            "a token of every running request before any of a prompt",
        )

    @property
    def max_num_workers(self) -> int:
        return self.shares.max_num_workers if self.mode == "semi-pd" else 1

    @property
    def share_policy(self) -> SharePolicy:
        """The one that the tuner starts with."""
        if self.tuner.policy != "auto":
            return self.tuner.policy
        can_predict = self.mode == "semi-pd" and self.tuner.profile is not None
        return "predictive" if can_predict else "static"

    def _require_no_shares(self) -> None:
        unset = ShareConfig()
        for name, key in (
            ("prefill_share", "prefill"),
            ("decode_share", "decode"),
            ("share_ladder", "ladder"),
            ("prefill_share_ladder", "prefill_ladder"),
            ("decode_share_ladder", "decode_ladder"),
        ):
            value = getattr(self.shares, key)
            allowed = f"unset with mode {self.mode!r}, whose one worker has all compute"
            require(value == getattr(unset, key), name, value, allowed)
        policy = self.share_policy
        require(policy == "static", "policy", policy, f"auto or static with mode {self.mode!r}")
