"""Systems to compare, by name: what runs the load, and how it is set up.

`static:X,Y`, `semi-pd`, `semi-pd-replan` and `predictive` are semi-PD engines with that policy;
`colocated`, `chunked` and `disaggregated` are what they are compared with. `+spf` after any of them
prefills the shortest remainder first. With `static:X,Y+idle` each phase has a second worker, with
all of the device, which takes its steps while the other phase has nothing to do; without, its share
is all it ever has. Both may be given, in any order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from semipd_jax.config import (
    PHASES,
    POLICIES,
    SchedulingPolicy,
    ShareConfig,
    SharePolicy,
    require,
)
from semipd_jax.scheduler.state import Limits
from semipd_jax.simulator.engines import (
    Disaggregated,
    Engine,
    Environment,
    OneWorker,
    Report,
    SemiPd,
)
from semipd_jax.simulator.platform import Platform
from semipd_jax.simulator.run import Build, Goal, Outcome, run
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner.policies import LADDERS, make_tuner
from semipd_jax.tuner.policy import FULL, Ladders, Shares
from semipd_jax.tuner.refined import RefinedModel
from semipd_jax.tuner.slo import SloTargets
from semipd_jax.tuner.tuner import Tuner

BASELINES: Final = ("disaggregated", "colocated", "chunked")
_POLICIES: Final[Mapping[str, SharePolicy]] = {policy: policy for policy in POLICIES}
_NO_LIMIT: Final = 2**31
_NO_LADDERS: Final = Ladders((1.0,), (1.0,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all systems share, and the step budget of each kind.

    Attributes:
      ladders: None means what suits each policy.
      chunk_tokens: of semi-PD's prefill steps, and of chunked steps with their decode rows. The
        default is that of vLLM's chunks in semi-PD's evaluation.
      whole_tokens: of prefill steps of engines without chunked prefill.
      max_rows: requests that run at once on a device.
      ageing_tokens_per_s: see `scheduler.order`.
      noise: standard deviation of the logarithm of a step's time.
    """

    platform: Platform
    targets: SloTargets
    ladders: Ladders | None = None
    chunk_tokens: int = 1024
    whole_tokens: int = 8192
    max_rows: int = 512
    ageing_tokens_per_s: float = 2000.0
    noise: float = 0.03
    seed: int = 0


@dataclass(frozen=True, slots=True)
class System:
    """
    Attributes:
      kind: a policy of semi-PD, or a baseline.
      shares: of `static`.
      has_idle_rule: of `static`: whether a phase alone takes all.
    """

    name: str
    kind: str
    order: SchedulingPolicy = "fcfs"
    shares: Shares = FULL
    has_idle_rule: bool = False

    @property
    def num_devices(self) -> int:
        return 2 if self.kind == "disaggregated" else 1


def parse(name: str) -> System:
    """Raises ConfigError that lists what is allowed."""
    base, *options = name.split("+")
    kind, colon, shares = base.partition(":")
    kinds = (*POLICIES, *BASELINES)
    require(kind in kinds, "system", name, ", ".join(kinds) + ", with +spf or without")
    known = {"spf", "idle"} if kind == "static" else {"spf"}
    is_known = known.issuperset(options) and len(set(options)) == len(options)
    require(is_known, "system", name, "after +, once each: spf and, for static, idle")
    require(not colon or kind == "static", "system", name, "shares for static only")
    given = FULL
    if colon:
        parts = shares.split(",")
        require(len(parts) == 2, "system", name, "static:PREFILL,DECODE")
        given = Shares(*map(float, parts))
    return System(name, kind, "spf" if "spf" in options else "fcfs", given, "idle" in options)


def run_at(
    system: System, setup: Setup, workload: Workload, rate: float, goal: Goal | None = None
) -> Outcome:
    """
    Args:
      rate: requests per second and device.
      goal: see `run`.
    """
    return run(workload.at(rate * system.num_devices), build(system, setup, workload), goal)


def build(system: System, setup: Setup, workload: Workload) -> Build:
    """A fresh engine for each run of the load."""
    longest = max(row.input_len + row.output_len for row in workload.rows)
    has_prefixes = any(row.hash_ids for row in workload.rows)
    ladders = setup.ladders or LADDERS.get(system.kind, _NO_LADDERS)
    platform = setup.platform

    def make(report: Report) -> Engine:
        limits = Limits(
            page_size=platform.page_size,
            num_pages=1 + platform.kv_tokens(_num_processes(system, ladders)) // platform.page_size,
            num_rows=1 + setup.max_rows,
            max_model_len=longest + 1,
            max_num_batched_tokens=_budget(system, setup),
            max_num_queued_reqs=_NO_LIMIT,
            policy=system.order,
            ageing_tokens_per_s=setup.ageing_tokens_per_s,
            enable_prefix_caching=has_prefixes,
        )
        environment = Environment(
            machine=platform.machine,
            limits=limits,
            hop_s=platform.hop_s,
            host_s=platform.host_s,
            noise=setup.noise,
            seed=setup.seed,
            report=report,
        )
        if system.kind in BASELINES:
            return _baseline(system, environment, platform)
        return _semi_pd(system, environment, setup, ladders)

    return make


def _num_processes(system: System, ladders: Ladders) -> int:
    """On one device. Rungs of the published ladder are started when needed: active and spare."""
    if system.kind in BASELINES:
        return 1
    if system.kind == "semi-pd-replan":
        return 4
    shares = _share_config(system, ladders)
    return sum(len(shares.rungs(phase)) for phase in PHASES)


def _budget(system: System, setup: Setup) -> int:
    is_whole = system.kind in ("colocated", "disaggregated")
    return setup.whole_tokens if is_whole else setup.chunk_tokens


def _baseline(system: System, environment: Environment, platform: Platform) -> Engine:
    if system.kind == "colocated":
        return OneWorker(environment, "colocated")
    if system.kind == "chunked":
        return OneWorker(environment, "chunked")
    require(platform.link is not None, "system", system.name, "systems of one device on this one")
    assert platform.link is not None
    return Disaggregated(environment, platform.link)


def _semi_pd(system: System, environment: Environment, setup: Setup, ladders: Ladders) -> Engine:
    policy, targets = _POLICIES[system.kind], setup.targets

    def tuner_of(policy: SharePolicy, targets: SloTargets, start: Shares) -> Tuner | None:
        if policy == "static":
            return None
        model = RefinedModel(setup.platform.predictor()) if policy == "predictive" else None
        return make_tuner(policy, ladders=ladders, targets=targets, model=model, start=start)

    return SemiPd(environment, _share_config(system, ladders), policy, targets, tuner_of)


def _share_config(system: System, ladders: Ladders) -> ShareConfig:
    if system.kind != "static":
        return ShareConfig(prefill_ladder=ladders.prefill, decode_ladder=ladders.decode)
    return ShareConfig(
        prefill=system.shares.prefill,
        decode=system.shares.decode,
        ladder=(1.0,) if system.has_idle_rule else (),
    )
