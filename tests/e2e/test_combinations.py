"""Every family in every mode under every policy, with the prefix cache on and off: greedy tokens
equal those of Hugging Face transformers, while shares move, pages run out and workers die."""

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from checkpoints import CASES, write_checkpoint
from hf_reference import Reference
from inprocess_engine import InProcessEngine, Programs
from modelled_profile import save_profile

from semipd_jax.config import (
    POLICIES,
    CacheConfig,
    EngineConfig,
    Mode,
    SchedulingPolicy,
    ShareConfig,
    SharePolicy,
    TunerConfig,
)
from semipd_jax.messages import SetPartition, SetSlo, Slo, Stats
from semipd_jax.request import Request, SamplingParams
from semipd_jax.runtime.compile import CompileCounter
from semipd_jax.tuner import policies

NUM_PAGES = 10
"""Room for 144 tokens, less than the four requests that run at once come to want."""

LADDER = ShareConfig(ladder=(0.5,))
PROMISES = {"slo_ttft_ms": 1e6, "slo_tpot_ms": 1.0}
"""TPOT always fails: a reactive policy takes compute from prefill."""

COMPILES = CompileCounter()
WINDOW = 3
KILLS = {20, 50}
"""After so many answers a worker dies."""


@dataclass(frozen=True)
class Combination:
    mode: Mode
    policy: SharePolicy
    order: SchedulingPolicy
    is_caching: bool

    def __str__(self) -> str:
        policy = [self.policy] if self.mode == "semi-pd" else []
        return "-".join([self.mode, *policy, self.order, "cache" if self.is_caching else "none"])


COMBINATIONS = [
    Combination(mode, policy, order, is_caching)
    for mode, policy in [("colocated", "static"), ("chunked", "static")]
    + [("semi-pd", policy) for policy in POLICIES]
    for order, is_caching in itertools.product(("fcfs", "spf"), (True, False))
]


@dataclass(frozen=True)
class Case:
    """A checkpoint, ready to serve, and what transformers generates with it.

    Attributes:
      jobs: (prompt, tokens that follow).
    """

    programs: Programs
    jobs: list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    family, overrides = CASES[request.param]
    directory = tmp_path_factory.mktemp("combinations")
    run_dir = directory / "run"
    run_dir.mkdir(mode=0o700)
    model = write_checkpoint(directory / "model", family, num_hidden_layers=2, **overrides)
    programs = Programs(
        model, run_dir, num_pages=NUM_PAGES, max_num_seqs=4, max_num_batched_tokens=32
    )
    return Case(programs, jobs_of(Reference(model)))


def jobs_of(reference: Reference) -> list[tuple[list[int], list[int]]]:
    """Prompts that begin alike or not, from one token to several chunks, and next turns of them."""
    rng = random.Random(0)

    def tokens(num: int) -> list[int]:
        return [rng.randrange(256) for _ in range(num)]

    system = tokens(34)
    prompts = [tokens(1), tokens(16), tokens(33), *(system + tokens(n) for n in (3, 15, 20, 41))]
    lengths = [40, 40, 40, 12, 40, 12, 12]  # the long ones grow by more than was expected of them
    jobs = [
        (prompt, reference.greedy(prompt, length)[0])
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    turns = [[*prompt, *output, *tokens(5)] for prompt, output in (jobs[2], jobs[4])]
    return jobs + [(prompt, reference.greedy(prompt, 10)[0]) for prompt in turns]


def config_of(programs: Programs, combination: Combination, profile: str) -> EngineConfig:
    is_split = combination.mode == "semi-pd"
    return replace(
        programs.config,
        mode=combination.mode,
        cache=CacheConfig(enable_prefix_caching=combination.is_caching),
        scheduler=replace(programs.config.scheduler, policy=combination.order),
        shares=LADDER if is_split else ShareConfig(),
        tuner=TunerConfig(policy=combination.policy, profile=profile, **PROMISES)
        if is_split
        else TunerConfig(),
    )


def move_shares(engine: InProcessEngine, policy: SharePolicy, rng: random.Random) -> None:
    """What an operator may do at any time. Reactive policies are left alone: a change would make
    them forget what they saw."""
    if policy == "static":
        prefill, decode = rng.choices([0.5, 1.0], k=2)
        engine.change(SetPartition(1, prefill, decode))
    elif policy == "predictive":
        engine.change(SetSlo(1, Slo(tpot_ms=rng.choice([0.001, 1e6]))))


def serve(engine: InProcessEngine, combination: Combination, case: Case) -> Iterator[int]:
    """Yields the handle of each job, in order; all are done in the end."""
    rng = random.Random(1)
    jobs = iter(case.jobs)
    num_answers = 0
    while True:
        if not engine.busy or rng.random() < 0.1:
            job = next(jobs, None)
            if job is not None:
                prompt, output = job
                sampling = SamplingParams(max_tokens=len(output), temperature=0.0, seed=0)
                yield engine.submit(
                    Request(request_id="r", prompt_token_ids=tuple(prompt), sampling=sampling)
                )
            elif not engine.busy:
                return
        elif num_answers in KILLS:
            engine.lose(rng.choice(engine.busy))
            num_answers += 1
        else:
            if combination.mode == "semi-pd" and rng.random() < 0.2:
                move_shares(engine, combination.policy, rng)
            engine.answer(rng.choice(engine.busy))
            num_answers += 1


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_greedy_tokens_equal_transformers(case: Case, combination, tmp_path: Path, monkeypatch):
    reactive = {n: functools.partial(p, window_size=WINDOW) for n, p in policies._REACTIVE.items()}
    monkeypatch.setattr(policies, "_REACTIVE", reactive)
    profile = save_profile(tmp_path / "profile.json")
    num_compiled = COMPILES.count
    engine = InProcessEngine(case.programs, config_of(case.programs, combination, profile))
    handles = list(serve(engine, combination, case))
    assert [engine.tokens[handle] for handle in handles] == [output for _, output in case.jobs]
    assert engine.done == set(handles)
    check(engine, engine.stats(), combination)
    assert COMPILES.count == num_compiled


def check(engine: InProcessEngine, stats: Stats, combination: Combination) -> None:
    """What the combination is about took place, and nothing is left of it."""
    assert stats.num_free_pages == stats.num_pages
    assert stats.num_quarantined_pages == 0
    assert stats.num_preemptions > 0
    assert (stats.prefix_cache_hits > 0) == combination.is_caching
    assert stats.num_prefill_restarts + stats.num_decode_restarts >= len(KILLS)
    mixed = {"MixedStep"} if combination.mode == "chunked" else set()
    assert engine.kinds == {"PrefillStep", "DecodeStep"} | mixed
    if combination.mode == "semi-pd":
        moved = stats.partition.prefill.num_switches + stats.partition.decode.num_switches
        assert moved > 0, "shares did not move"
