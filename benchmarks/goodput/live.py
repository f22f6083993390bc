"""Servers as subjects: each system is this project's server with the flags that make it so."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks import metrics
from benchmarks.goodput.search import Trial
from benchmarks.load import LoadRun, run_load
from benchmarks.metrics import RequestRecord
from benchmarks.processes import cpu_seconds
from benchmarks.semipd import running_server, sender
from benchmarks.workload import PlannedRequest, replayed
from semipd_jax.config import PHASES, POLICIES, require
from semipd_jax.errors import EngineError
from semipd_jax.messages import Phase
from semipd_jax.simulator.run import Outcome
from semipd_jax.simulator.systems import System
from semipd_jax.simulator.traces import clip
from semipd_jax.simulator.workloads import Workload
from semipd_jax.tuner.policies import LADDERS
from semipd_jax.tuner.policy import Ladders
from semipd_jax.tuner.slo import SloTargets
from semipd_server.client import AsyncClient
from semipd_server.control_client import ControlClient

_POLL_S: Final = 0.25
_MOST_TRIALS: Final = 1000  # with prompts of their own, for each seed

type Shares = dict[Phase, list[tuple[float, float]]]


def flags_of(
    system: System, targets: SloTargets, ladders: Ladders | None, profile: Path | None
) -> list[str]:
    """Of `python -m semipd_jax.serve`. Raises ConfigError for what is no single server."""
    target = targets.default
    flags = ["--scheduling-policy", system.order]
    if system.kind == "static":
        prefill, decode = str(system.shares.prefill), str(system.shares.decode)
        flags += ["--prefill-share", prefill, "--decode-share", decode]
        return [*flags, "--share-ladder", "1.0"] if system.has_idle_rule else flags
    if system.kind not in POLICIES:
        require(system.kind != "disaggregated", "system", system.name, "systems of one device")
        return [*flags, "--mode", system.kind]
    flags += ["--policy", system.kind]
    for phase in PHASES:
        rungs = (ladders or LADDERS[system.kind]).of(phase)
        flags += [f"--{phase}-share-ladder", ",".join(map(str, rungs))]
    flags += ["--slo-ttft-ms", str(target.ttft_ms), "--slo-tpot-ms", str(target.tpot_ms)]
    flags += ["--slo-target", str(targets.attainment)]
    return flags if profile is None else [*flags, "--tuner-profile", str(profile)]


def limits_of(
    system: System,
    *,
    chunk_tokens: int | None,
    whole_tokens: int | None,
    max_num_seqs: int | None,
    ageing_tokens_per_s: float | None,
) -> list[str]:
    """Flags of the server for what is given, as `Setup` describes it; else its own defaults."""
    budget = whole_tokens if system.kind == "colocated" else chunk_tokens
    limits = {
        "--max-num-batched-tokens": budget,
        "--max-num-seqs": max_num_seqs,
        "--ageing-tokens-per-s": ageing_tokens_per_s,
    }
    return [str(word) for limit in limits.items() if limit[1] is not None for word in limit]


@dataclass(frozen=True, slots=True)
class Server:
    """
    Attributes:
      load: seed → requests.
      timeout_s: for any one wait.
    """

    name: str
    model: str
    flags: Sequence[str]
    load: Callable[[int], Workload]
    timeout_s: float

    @contextmanager
    def running(self, seed: int) -> Iterator[Trial]:
        """A fresh server for each search. Prompts are new in every trial, but for prefixes that
        a trace's requests share."""
        workload, prompts = self.load(seed), count(seed * _MOST_TRIALS)
        with tempfile.TemporaryDirectory(prefix="goodput-") as folder:
            socket = f"{folder}/control.sock"
            flags = [*self.flags, "--control-socket", socket]
            with (
                running_server(self.model, flags, timeout_s=self.timeout_s) as (target, model),
                ControlClient(f"unix:{socket}") as control,
            ):

                def trial(rate: float) -> Outcome:
                    load = workload.at(rate)
                    rows, _ = clip(list(load.rows), model.max_model_len)
                    planned = replayed(
                        rows,
                        hash_block_len=load.hash_block_len,
                        vocab_size=model.vocab_size,
                        seed=next(prompts),
                    )
                    return asyncio.run(_run(planned, target, control, self.timeout_s))

                yield trial


async def _run(
    planned: Sequence[PlannedRequest], target: str, control: ControlClient, timeout_s: float
) -> Outcome:
    shares: Shares = {phase: [] for phase in PHASES}
    host_s = _host_seconds()
    watching = asyncio.create_task(_watch(control, shares))
    try:
        async with AsyncClient(target) as client:
            run = await run_load(planned, sender(client), request_timeout_s=timeout_s)
    finally:
        watching.cancel()
    return outcome_of(run, shares, _host_seconds() - host_s)


def _host_seconds() -> float:
    """CPU time so far of all processes but the workers: those of the server and this one."""
    return sum(s for name, s in cpu_seconds("load").items() if " worker " not in name)


async def _watch(control: ControlClient, shares: Shares) -> None:
    """Notes the share of each phase's latest step now and then, when the server answers."""
    started_s = time.perf_counter()
    while True:
        with suppress(TimeoutError, EngineError):
            partition = await asyncio.to_thread(control.partition)
            for phase in PHASES:
                now = getattr(partition, phase)
                changes = shares[phase]
                if now.HasField("current") and (not changes or changes[-1][1] != now.current):
                    changes.append((time.perf_counter() - started_s, now.current))
        await asyncio.sleep(_POLL_S)


def outcome_of(run: LoadRun, shares: Shares, host_s: float | None = None) -> Outcome:
    """Times as clients saw them. `host_s` is the CPU time that was not spent in steps."""
    records = run.records
    served = np.array([record.status == metrics.OK for record in records])

    def times(of: Callable[[RequestRecord], float | None]) -> np.ndarray:
        values = [of(r) if r.status == metrics.OK else None for r in records]
        return np.array([np.nan if value is None else value for value in values])

    counters = {"generator_cpu_share": run.health.cpu_share}
    if host_s is not None:
        num_tokens = sum(record.num_output_tokens for record in records)
        counters["host_ms_per_token"] = 1e3 * host_s / max(1, num_tokens)
    started_s = min(record.sent_s for record in records)
    return Outcome(
        ttft_s=times(metrics.ttft_s),
        tpot_s=times(metrics.tpot_s),
        e2e_s=times(metrics.e2e_s),
        served=served,
        duration_s=max(record.finished_s for record in records) - started_s,
        counters=counters,
        shares=shares,
    )
