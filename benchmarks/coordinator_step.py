"""`python -m benchmarks.coordinator_step`: coordinator time of one decode step, without processes
or sockets.

Drives the real `Coordinator` and `Scheduler` with senders that only encode. What is timed is all
that the coordinator does for one reply: decode it, take the tokens in, plan the next step, encode
that and the clients' outputs. Not in it: the socket calls (20-30 µs a step).
"""

import argparse
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from benchmarks import common
from semipd_jax.config import ShareConfig, SharePolicy
from semipd_jax.coordinator.coordinator import Coordinator
from semipd_jax.coordinator.tuned import TunedShares
from semipd_jax.messages import (
    DecodeStep,
    FromWorker,
    PrefillStep,
    StepDone,
    Submit,
    WorkerReady,
)
from semipd_jax.request import Request, SamplingParams
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Limits, pages_for
from semipd_jax.tuner.latency import FEATURES, LatencyModel
from semipd_jax.tuner.policies import make_tuner
from semipd_jax.tuner.policy import Ladders, Shares
from semipd_jax.tuner.refined import RefinedModel
from semipd_jax.tuner.slo import SloTarget, SloTargets
from semipd_jax.tuner.tuner import Tuner

_PAGE_SIZE = 16
_TOKEN_ID = 7
_STEP_S = 0.02
_LADDER = (0.2, 0.4, 0.7, 1.0)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder[Any](FromWorker)


class _EncodingSender:
    """Encodes what is sent, as a `Hub` does, and keeps the steps."""

    def __init__(self) -> None:
        self.steps: deque[PrefillStep | DecodeStep] = deque()

    def send(self, peer: str, message: Any) -> bool:
        _encoder.encode(message)
        if isinstance(message, PrefillStep | DecodeStep):
            self.steps.append(message)
        return True


def step_times_s(
    *, num_rows: int, context_len: int, num_steps: int, policy: SharePolicy = "static"
) -> list[float]:
    """Seconds of each of `num_steps` steady decode steps of `num_rows` rows, beside a prefill step
    that never ends.

    Args:
      context_len: tokens of each request before the first timed step.
      policy: asked for the share of each step.
    """
    sender = _EncodingSender()
    coordinator = _coordinator(sender, num_rows, context_len + num_steps + 16, policy)
    for phase in ("prefill", "decode"):
        coordinator.from_worker(WorkerReady(phase, phase, 1.0))
    for handle in range(num_rows):
        _submit(coordinator, handle, context_len, num_steps + 16)
    while not _is_steady(sender, num_rows):
        _answer(coordinator, sender)
    _submit(coordinator, num_rows, context_len, 1)
    sender.steps = deque(step for step in sender.steps if isinstance(step, DecodeStep))
    return [_answer(coordinator, sender) for _ in range(num_steps)]


def _submit(coordinator: Coordinator, handle: int, prompt_len: int, max_tokens: int) -> None:
    sampling = SamplingParams(temperature=0.0, seed=0, ignore_eos=True, max_tokens=max_tokens)
    prompt = tuple(range(handle, handle + prompt_len))  # no two share a page
    request = Request(request_id=str(handle), prompt_token_ids=prompt, sampling=sampling)
    coordinator.from_client("client", Submit(handle, request))


def _coordinator(
    sender: _EncodingSender, num_rows: int, max_len: int, policy: SharePolicy
) -> Coordinator:
    limits = Limits(
        page_size=_PAGE_SIZE,
        num_pages=1 + (num_rows + 1) * pages_for(max_len, _PAGE_SIZE),
        num_rows=2 + num_rows,
        max_model_len=max_len,
        max_num_batched_tokens=65536,
        max_num_queued_reqs=num_rows,
    )
    scheduler, targets = Scheduler(limits), SloTargets(SloTarget(ttft_ms=300.0, tpot_ms=50.0))
    model = LatencyModel(
        {phase: np.full(len(names), 1e-3) for phase, names in FEATURES.items()},
        saturation=0.5,
        yielding={"prefill": 0.0, "decode": 0.0},
    )
    refined = RefinedModel(model)

    ladders = Ladders(_LADDER, _LADDER)

    def tuner_of(policy: SharePolicy, targets: SloTargets, start: Shares) -> Tuner | None:
        if policy == "static":
            return None
        return make_tuner(policy, ladders=ladders, targets=targets, model=refined, start=start)

    shares = ShareConfig(ladder=_LADDER)
    clock = time.monotonic
    return Coordinator(
        scheduler,
        sender,
        sender,
        TunedShares(shares, tuner_of, scheduler, clock, policy=policy, targets=targets),
        step_timeout_s=60.0,
        tell_launcher=lambda _: None,
    )


def _is_steady(sender: _EncodingSender, num_rows: int) -> bool:
    return all(
        isinstance(step, DecodeStep) and len(step.rows) == 4 * num_rows for step in sender.steps
    )


def _answer(coordinator: Coordinator, sender: _EncodingSender) -> float:
    """Answers the oldest step; returns the seconds that the coordinator took."""
    step = sender.steps.popleft()
    phase = "prefill" if isinstance(step, PrefillStep) else "decode"
    tokens = np.full(len(step.rows) // 4, _TOKEN_ID, np.int32)
    payload = _encoder.encode(StepDone(phase, step.step_id, tokens.tobytes(), _STEP_S, 0))
    started = time.perf_counter()
    coordinator.from_worker(_decoder.decode(payload))
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coordinator_step",
        description="Time the coordinator's part of a decode step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=256, help="requests that decode")
    parser.add_argument("--context-len", type=int, default=1000, help="tokens of each")
    parser.add_argument("--steps", type=int, default=500, help="steps that are timed")
    args = parser.parse_args(argv)
    rows: list[tuple[str, float, float, float]] = []
    policies: tuple[SharePolicy, ...] = ("static", "predictive")
    for policy in policies:
        times_ms = 1e3 * np.asarray(
            step_times_s(
                num_rows=args.rows,
                context_len=args.context_len,
                num_steps=args.steps,
                policy=policy,
            )
        )
        p50, p99 = np.percentile(times_ms, (50, 99)).tolist()
        rows.append((policy, float(times_ms.mean()), p50, p99))
    common.print_table(("ms a step", "mean", "p50", "p99"), rows)


if __name__ == "__main__":
    main()
