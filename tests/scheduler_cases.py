"""A scheduler with a fake device behind it, requests for it, and what must come out."""

from collections.abc import Iterable

from fake_device import FakeDevice, mask_of, may_follow, next_token

from semipd_jax.config import Lane
from semipd_jax.request import FinishReason, Request, SamplingParams, StructuredOutputs
from semipd_jax.scheduler.lanes import next_step
from semipd_jax.scheduler.scheduler import Result, Scheduler
from semipd_jax.scheduler.state import Constraint, Limits, RequestState

PAGE_SIZE, MAX_LEN = 4, 24


def make_scheduler(
    *, num_pages: int = 20, num_rows: int = 5, budget: int = 16, queue: int = 100, **limits
):
    scheduler = Scheduler(
        Limits(
            page_size=PAGE_SIZE,
            num_pages=num_pages,
            num_rows=num_rows,
            max_model_len=MAX_LEN,
            max_num_batched_tokens=budget,
            max_num_queued_reqs=queue,
            **limits,
        )
    )
    device = FakeDevice(
        num_pages=num_pages, page_size=PAGE_SIZE, num_rows=num_rows, length=MAX_LEN + 1
    )
    return scheduler, device


def make_prompt(length: int, kind: int = 0) -> tuple[int, ...]:
    """Prompts of one kind begin alike."""
    return tuple((i * 13 + kind) % 50 for i in range(length))


def make_request(
    prompt: int | tuple[int, ...],
    max_tokens: int,
    *,
    seed: int = 0,
    stop=(),
    constrained: bool = False,
    **fields,
) -> Request:
    """`prompt` may be a length: prompts with different seeds then have no page in common. What
    `fake_device.may_follow` says is the form of constrained ones."""
    tokens = make_prompt(prompt, seed) if isinstance(prompt, int) else prompt
    return Request(
        request_id=f"{len(tokens)}-{max_tokens}-{seed}",
        prompt_token_ids=tokens,
        sampling=SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=tuple(stop),
            structured_outputs=StructuredOutputs(regex="x") if constrained else None,
        ),
        **fields,
    )


def constraint_of(request: Request) -> Constraint | None:
    """As `Scheduler.submit` takes it."""
    if request.sampling.structured_outputs is None:
        return None
    return Constraint(matcher=None, mask=mask_of([]))


def make_mask(scheduler: Scheduler, request: RequestState) -> Result:
    """What the threads that make masks would do."""
    output = request.token_ids[request.num_prompt :]
    return scheduler.mask_made(request, mask_of(output), now_s=0.0)


def expected(request: Request) -> tuple[list[int], FinishReason]:
    """What the request generates, whatever else runs."""
    tokens, sampling = list(request.prompt_token_ids), request.sampling
    output: list[int] = []
    while len(output) < (sampling.max_tokens or 0):
        allowed = None if sampling.structured_outputs is None else may_follow(output)
        if allowed == []:
            return output, FinishReason.STOP
        output.append(next_token([*tokens, *output], sampling.seed or 0, allowed))
        if output[-1] in sampling.stop_token_ids:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


class Outcome:
    """Collects what each handle got."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.endings: dict[int, object] = {}

    def take(self, result: Result) -> None:
        for token in result.tokens:
            assert token.request.handle not in self.endings, "a token after the end"
            self.tokens.setdefault(token.request.handle, []).append(token.token_id)
        for ending in result.endings:
            assert ending.request.handle not in self.endings, "ended twice"
            self.endings[ending.request.handle] = ending


def run_to_end(
    scheduler: Scheduler,
    device: FakeDevice,
    outcome: Outcome,
    *,
    lanes: Iterable[Lane] = ("prefill", "decode"),
    most: int = 5000,
):
    """Sends, runs and answers one step at a time, of the first lane that has one, until nothing is
    left."""
    for _ in range(most):
        planned = (next_step(scheduler, lane, now_s=0.0) for lane in lanes)
        sent = next(filter(None, planned), None)
        if sent is None:
            break
        result = scheduler.step_done(device.run(sent.step), now_s=0.0)
        outcome.take(result)
        for token in result.unmasked:
            outcome.take(make_mask(scheduler, token.request))
        scheduler.state.check()
    assert not scheduler.state.requests, "requests are stuck"
    assert not scheduler.state.in_flight


def run_alone(scheduler: Scheduler, device: FakeDevice, handle: int, request: Request) -> list[int]:
    """Submits one request and runs everything to the end; its tokens."""
    assert scheduler.submit("c", handle, request, now_s=0.0) is None
    outcome = Outcome()
    run_to_end(scheduler, device, outcome)
    return outcome.tokens[handle]
