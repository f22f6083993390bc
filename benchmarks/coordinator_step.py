"""Coordinator time of one decode step, without processes or sockets.

Drives the real `Coordinator` and `Scheduler` with senders that only encode. What is timed is all
that the coordinator does for one reply: decode it, take the tokens in, plan the next step, encode
that and the clients' outputs. Not in it: the socket calls (20-30 µs a step).
"""

import time
from collections import deque
from typing import Any

import msgspec
import numpy as np

from semipd_jax.config import ShareConfig
from semipd_jax.coordinator.coordinator import Coordinator
from semipd_jax.coordinator.shares import ShareControl
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

_PAGE_SIZE = 16
_TOKEN_ID = 7

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


def step_times_s(*, num_rows: int, context_len: int, num_steps: int) -> list[float]:
    """Seconds of each of `num_steps` steady decode steps of `num_rows` rows.

    Args:
      context_len: tokens of each request before the first timed step.
    """
    sender = _EncodingSender()
    coordinator = _coordinator(sender, num_rows, context_len + num_steps + 16)
    for phase in ("prefill", "decode"):
        coordinator.from_worker(WorkerReady(phase, phase, 1.0))
    sampling = SamplingParams(temperature=0.0, seed=0, ignore_eos=True, max_tokens=num_steps + 16)
    for handle in range(num_rows):
        prompt = tuple(range(handle, handle + context_len))  # no two share a page
        request = Request(request_id=str(handle), prompt_token_ids=prompt, sampling=sampling)
        coordinator.from_client("client", Submit(handle, request))
    while not _is_steady(sender, num_rows):
        _answer(coordinator, sender)
    return [_answer(coordinator, sender) for _ in range(num_steps)]


def _coordinator(sender: _EncodingSender, num_rows: int, max_len: int) -> Coordinator:
    limits = Limits(
        page_size=_PAGE_SIZE,
        num_pages=1 + num_rows * pages_for(max_len, _PAGE_SIZE),
        num_rows=1 + num_rows,
        max_model_len=max_len,
        max_num_batched_tokens=65536,
        max_num_queued_reqs=num_rows,
    )
    return Coordinator(
        Scheduler(limits),
        sender,
        sender,
        ShareControl(ShareConfig()),
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
    payload = _encoder.encode(StepDone(phase, step.step_id, tokens.tobytes(), 0.0, 0))
    started = time.perf_counter()
    coordinator.from_worker(_decoder.decode(payload))
    return time.perf_counter() - started
