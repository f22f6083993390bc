"""The coordinator between a client and workers of plain Python."""

from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np
from fake_device import FakeDevice, mask_of, may_follow, next_token

from semipd_jax.config import LANES, Mode, ShareConfig
from semipd_jax.coordinator.coordinator import Coordinator
from semipd_jax.coordinator.shares import ShareControl
from semipd_jax.coordinator.structured import Compiled, Masked
from semipd_jax.messages import (
    Done,
    Outputs,
    StepDone,
    Submit,
    ToLauncher,
    WorkerReady,
)
from semipd_jax.request import Request, SamplingParams, StructuredOutputs
from semipd_jax.scheduler.scheduler import Scheduler
from semipd_jax.scheduler.state import Constraint, Limits

LIMITS = Limits(
    page_size=4,
    num_pages=40,
    num_rows=9,
    max_model_len=32,
    max_num_batched_tokens=16,
    max_num_queued_reqs=4,
)


NO_LADDER = ShareConfig()
MOST_ANSWERS = 5000


class Sent:
    """A channel's end that keeps what is sent, per peer. Everything goes through MessagePack."""

    def __init__(self) -> None:
        self.messages: dict[str, deque] = {}
        self.unreachable: set[str] = set()

    def send(self, peer: str, message) -> bool:
        if peer in self.unreachable:
            return False
        payload = msgspec.msgpack.encode(message)
        self.messages.setdefault(peer, deque()).append(
            msgspec.msgpack.decode(payload, type=type(message))
        )
        return True


class FakeGrammars:
    """The grammar of `fake_device.may_follow` for all, at once, but late for handles in `late`.
    A form that is a lone "(" is wrong."""

    def __init__(self) -> None:
        self.late: set[int] = set()
        self.wanted: dict[int, Callable[[], bool]] = {}
        self._held: list[Compiled | Masked] = []
        self._ready: list[Compiled | Masked] = []

    def compile(self, client: str, handle: int, request: Request, is_wanted) -> None:
        self.wanted[handle] = is_wanted
        if request.sampling.structured_outputs.regex == "(":
            made = Compiled(client, handle, request, None, "unclosed", "structured_outputs.regex")
        else:
            made = Compiled(client, handle, request, Constraint(None, mask_of([])))
        (self._held if handle in self.late else self._ready).append(made)

    def advance(self, request, token_id: int) -> None:
        output = request.token_ids[request.num_prompt :]
        assert output[-1] == token_id
        made = Masked(request, mask_of(output))
        (self._held if request.handle in self.late else self._ready).append(made)

    def take(self, wait_s: float = 0.0) -> list[Compiled | Masked]:
        ready, self._ready = self._ready, []
        return ready

    def release(self) -> None:
        """What is late is there."""
        self._ready += self._held
        self._held = []


class Engine:
    def __init__(
        self,
        shares: ShareConfig = NO_LADDER,
        limits: Limits = LIMITS,
        *,
        mode: Mode = "semi-pd",
        has_grammars: bool = True,
    ) -> None:
        self.lanes = LANES[mode]
        self.num_answers = 0
        self.now = 0.0
        self.asked: list[ToLauncher] = []
        self.workers, self.clients = Sent(), Sent()
        self.device = FakeDevice(num_pages=40, page_size=4, num_rows=9, length=33)
        self.scheduler = Scheduler(limits)
        self.grammars = FakeGrammars()
        self.coordinator = Coordinator(
            self.scheduler,
            self.workers,
            self.clients,
            ShareControl(shares, LANES[mode]),
            step_timeout_s=10.0,
            tell_launcher=self.asked.append,
            grammars=self.grammars if has_grammars else None,
            clock=lambda: self.now,
        )

    def start_workers(self, generation: int = 1) -> None:
        for lane in self.lanes:
            self.coordinator.from_worker(WorkerReady(f"{lane}-{generation}", lane, 1.0))

    def submit(
        self,
        handle: int,
        *,
        prompt_len: int = 6,
        max_tokens: int = 8,
        client: str = "c",
        regex: str | None = None,
    ) -> Request:
        """With a `regex`, the output is constrained."""
        form = None if regex is None else StructuredOutputs(regex=regex)
        request = Request(
            request_id=str(handle),
            prompt_token_ids=tuple((handle + i) % 50 for i in range(prompt_len)),
            sampling=SamplingParams(
                max_tokens=max_tokens, seed=handle, logprobs=None, structured_outputs=form
            ),
        )
        self.coordinator.from_client(client, Submit(handle, request))
        return request

    def queue(self, worker: str) -> deque:
        return self.workers.messages.setdefault(worker, deque())

    def answer(self, worker: str) -> StepDone:
        reply = self.device.run(self.queue(worker).popleft(), worker)
        self.coordinator.from_worker(reply)
        self.num_answers += 1
        return reply

    def run(self, generation: int = 1) -> None:
        names = [f"{lane}-{generation}" for lane in self.lanes]
        while any(self.queue(name) for name in names):
            for name in names:
                if self.queue(name):
                    self.answer(name)
            self.scheduler.state.check()
            assert self.num_answers < MOST_ANSWERS, "requests get in each other's way for ever"

    def received(self, client: str = "c") -> tuple[dict[int, list[int]], dict[int, Done]]:
        tokens: dict[int, list[int]] = {}
        done: dict[int, Done] = {}
        for message in self.clients.messages.get(client, ()):
            if isinstance(message, Outputs):
                handles = np.frombuffer(message.handles, np.int64).tolist()
                for handle, token in zip(
                    handles, np.frombuffer(message.token_ids, np.int32).tolist(), strict=True
                ):
                    tokens.setdefault(handle, []).append(token)
                done |= {d.handle: d for d in message.done}
        return tokens, done


def expected(request: Request) -> list[int]:
    output: list[int] = []
    while len(output) < request.sampling.max_tokens:
        allowed = None if request.sampling.structured_outputs is None else may_follow(output)
        if allowed == []:
            break
        tokens = [*request.prompt_token_ids, *output]
        output.append(next_token(tokens, request.sampling.seed, allowed))
    return output
