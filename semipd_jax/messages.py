"""What processes say to each other: one union per direction, no tensors, ids everywhere.

Two kinds of channel carry these messages.

* ZeroMQ, MessagePack (`transport`): client ⇄ coordinator ⇄ workers, while the engine runs.
* Pipes, one JSON line per message (`child`): the launcher and each of its children, for start-up,
  progress and supervision. A child's standard input doubles as its lifeline: end of file means
  that the launcher is gone or wants it to stop.

Arrays travel as little-endian bytes of the dtype named beside the field (`numpy.tobytes`), row
major. Row 0 and page 0 are scratch: padding names them, no request holds them.
"""

from typing import Final

import msgspec
import numpy as np

from semipd_jax.config import EngineConfig, Lane, Phase, Platform, SharePolicy
from semipd_jax.request import FinishReason, Request, Timings, TokenLogprob

OTHER_PHASE: Final[dict[Phase, Phase]] = {"prefill": "decode", "decode": "prefill"}

ROW_SAMPLING: Final = np.dtype(
    [
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("presence_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
        ("repetition_penalty", "<f4"),
        ("top_k", "<i4"),
        ("seed", "<u4"),
        ("prompt_len", "<i4"),  # tokens [0, prompt_len) are prompt, the rest was generated
        ("num_logprobs", "<i4"),  # -1: none; 0: the sampled token's; n: and the n best
    ]
)
"""One row's sampling parameters on the wire and in the coordinator's table."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Base of messages on ZeroMQ channels."""


# ---------------------------------------------------------------- coordinator → worker


class LogitBias(Message, frozen=True):
    """Biases of the rows that have any: `token_ids` and `values` are [rows, width], padded with -1
    and 0. A value of -inf forbids the token (how `min_tokens` is enforced)."""

    width: int
    token_ids: bytes  # int32
    values: bytes  # float32


class TokenMasks(Message, frozen=True):
    """Which tokens may be sampled, of the rows whose output must have a form.

    Bit v % 32 of word v // 32 is 1 where token v may follow.
    """

    width: int  # words: one bit per token id of the model
    places: bytes  # int32 [masks]: positions of those rows in the step
    words: bytes  # uint32 [masks, width]


class History(Message, frozen=True):
    """The first tokens of a row, whose KV other requests computed."""

    row: int
    token_ids: bytes  # int32


class PrefillStep(Message, frozen=True):
    """Run one chunk for each of R requests, packed one after another.

    Request r brings tokens `cu_q_lens[r]:cu_q_lens[r + 1]`; they are the last ones of the first
    `context_lens[r]` tokens of that request. Where `samples[r]`, the chunk is the prompt's last and
    one token is sampled from its final position and written to
    `tokens[rows[r], context_lens[r]]`.

    `history` is written to `tokens` before the chunks: a request's first chunk comes with the
    tokens before it, so that its row always holds all of its tokens.
    """

    step_id: int
    token_ids: bytes  # int32 [T]
    cu_q_lens: bytes  # int32 [R + 1]
    context_lens: bytes  # int32 [R]
    rows: bytes  # int32 [R]
    samples: bytes  # bool [R]
    table_width: int
    page_table: bytes  # int32 [R, table_width]
    sampling: bytes  # ROW_SAMPLING [R]
    bias: LogitBias | None = None
    masks: TokenMasks | None = None
    history: tuple[History, ...] = ()


class DecodeStep(Message, frozen=True):
    """Generate one token for each of B rows.

    Row b's input token is `tokens[rows[b], context_lens[b] - 1]`, already in shared memory: written
    by prefill or by an earlier decode step. The sampled one goes to
    `tokens[rows[b], context_lens[b]]`.
    """

    step_id: int
    context_lens: bytes  # int32 [B]: tokens visible to the row, including this step's input
    rows: bytes  # int32 [B]
    table_width: int
    page_table: bytes  # int32 [B, table_width]
    sampling: bytes  # ROW_SAMPLING [B]
    bias: LogitBias | None = None
    masks: TokenMasks | None = None


class MixedStep(Message, frozen=True):
    """One forward pass for both: a decode step and a prefill step with the same id, of different
    requests. Its rows are those of `decode`, then those of `prefill`."""

    decode: DecodeStep
    prefill: PrefillStep

    @property
    def step_id(self) -> int:
        return self.decode.step_id


type ToWorker = PrefillStep | DecodeStep | MixedStep


def parts(step: ToWorker) -> tuple[PrefillStep | DecodeStep, ...]:
    """A mixed step's two, or the step itself."""
    return (step.decode, step.prefill) if isinstance(step, MixedStep) else (step,)


# ---------------------------------------------------------------- worker → coordinator


class WorkerReady(Message, frozen=True):
    """Memory is mapped and every bucket is compiled: steps may be sent.

    `worker_id` names one process for good: a replacement has another one.
    """

    worker_id: str
    lane: Lane
    share: float


class StepLogprobs(Message, frozen=True):
    """Of each row, in step order: the sampled token's and the best `MAX_LOGPROBS` tokens'."""

    sampled: bytes  # float32 [rows]
    top_ids: bytes  # int32 [rows, MAX_LOGPROBS]
    top_logprobs: bytes  # float32 [rows, MAX_LOGPROBS]


class StepDone(Message, frozen=True):
    """Everything the step wrote is visible to all processes."""

    worker_id: str
    step_id: int
    token_ids: bytes  # int32 [rows of the step]; meaningless where `samples` is false
    device_s: float  # time from dispatch, or from the previous step's end, to the end of this step
    num_compiles: int  # programs compiled since WorkerReady; anything but 0 is a defect
    logprobs: StepLogprobs | None = None


type FromWorker = WorkerReady | StepDone

# ---------------------------------------------------------------- client → coordinator


class Submit(Message, frozen=True):
    """`handle` is the client's own number for the request; replies carry it.

    `sampling` in the request is complete: `max_tokens` and `seed` are set, and `stop_token_ids`
    includes the model's end-of-sequence tokens unless `ignore_eos`.
    """

    handle: int
    request: Request


class Abort(Message, frozen=True):
    """The client wants no more tokens. Answered by `Done`, unless the request has ended already.
    `reason` is what that reports: ABORT, or STOP when the client found a stop string. With `error`,
    it is not the user who ends it, and the request has failed."""

    handle: int
    reason: FinishReason = FinishReason.ABORT
    error: str | None = None


class GetStats(Message, frozen=True):
    """Answered by `Stats` with the same `query_id`."""

    query_id: int


class SetPartition(Message, frozen=True):
    """Run the phases at these shares from their next steps on, or let this policy choose them; None
    leaves one as it is. A share makes the policy "static"; with another policy before, the other
    phase gets the share it was configured with. Answered by `PartitionReply` with the
    same `query_id`."""

    query_id: int
    prefill: float | None = None
    decode: float | None = None
    policy: SharePolicy | None = None


class Slo(Message, frozen=True):
    """Milliseconds promised to the requests of a priority, or to those whose priority has no
    promise of its own; None promises nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    priority: int | None = None


class SetSlo(Message, frozen=True):
    """Takes the place of what was promised to the same requests; with `remove`, the priority has no
    promise of its own any more. `target` is the share of requests that should meet both; None
    leaves it as it is. Answered by `PartitionReply` with the same `query_id`."""

    query_id: int
    slo: Slo
    target: float | None = None
    remove: bool = False


type ToCoordinator = Submit | Abort | GetStats | SetPartition | SetSlo

# ---------------------------------------------------------------- coordinator → client


class Refused(Message, frozen=True):
    """The queue is full and `message` says how full, or the request can never succeed because of
    its `field`."""

    handle: int
    message: str
    field: str = ""


class Admitted(Message, frozen=True):
    """Prefill of the request begins."""

    handle: int
    cached_tokens: int
    queue_s: float


class Done(Message, frozen=True):
    """The request's last message. `error` is set when the engine gave up on it."""

    handle: int
    reason: FinishReason
    timings: Timings
    completion_tokens: int
    stop_token_id: int | None = None
    error: str | None = None


class Outputs(Message, frozen=True):
    """What one step brought for this client: the i-th token belongs to the i-th handle.

    `logprobs` names positions in the two arrays; a request that did not ask for any is absent.
    `done` comes after the tokens.
    """

    handles: bytes  # int64
    token_ids: bytes  # int32
    logprobs: list[tuple[int, TokenLogprob]]
    done: list[Done]


class PhaseShares(Message, frozen=True):
    """The compute of one phase.

    `asked` is what was chosen; `current` is that of the last step; `warm` are those with a ready
    worker. Whatever was chosen, a phase alone runs at its largest share.
    """

    asked: float
    current: float | None
    warm: tuple[float, ...]
    num_switches: int


class Choice(Message, frozen=True):
    """The policy's latest decision, and why, as `tuner.policy.Decision` has it."""

    age_s: float
    phase: Phase  # whose step was about to be sent
    prefill: float
    decode: float
    reason: str
    predicted_prefill_s: float | None
    predicted_decode_s: float | None
    inputs: dict[str, float]


class Partition(Message, frozen=True):
    """How compute is divided, by whom, and for what.

    `slos` begins with that of requests whose priority has none of its own.
    """

    policy: SharePolicy
    prefill: PhaseShares
    decode: PhaseShares
    slos: tuple[Slo, ...]
    slo_target: float
    choice: Choice | None = None  # None under "static"


class PartitionReply(Message, frozen=True):
    """After the change that was asked for, unless `error` says why it was not made."""

    query_id: int
    partition: Partition
    error: str | None = None


class Percentiles(Message, frozen=True):
    p50: float
    p90: float
    p99: float


class RecentRequests(Message, frozen=True):
    """Those of `SloCounts` that ended in the last `window_s`. Times are seconds, of those that were
    served, the latest 1024 at most; None if there is nothing to tell."""

    window_s: float
    num_ended: int
    num_met: int  # both of their targets
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None


class SloCounts(Message, frozen=True):
    """Requests that ended. Those that failed, or were turned away because there was no room, met
    nothing; nor did those whose client left after a promise was broken. Those whose client left
    before, and those that can never be served, are not counted."""

    num_ended: int
    num_met: int  # both targets
    num_ttft_met: int
    num_tpot_met: int


class PredictionError(Message, frozen=True):
    """Sum of |measured - predicted| / predicted over `count` steps of one phase."""

    count: int
    total: float


class Stats(Message, frozen=True, kw_only=True):
    """The engine at one moment: counts grow from its start, rates follow from two of these."""

    query_id: int
    time_s: float  # on the coordinator's clock
    partition: Partition
    num_running: int
    num_waiting: int  # in the queue, or for their grammars
    num_pages: int
    num_free_pages: int  # of no request; those of them that are cached are given up when needed
    num_quarantined_pages: int
    num_cached_pages: int  # that requests may find, whether or not others use them now
    num_idle_cached_pages: int  # those of the free pages that are cached
    num_preemptions: int
    num_prefill_steps: int
    num_decode_steps: int
    num_prefill_restarts: int  # workers that were replaced
    num_decode_restarts: int
    num_compiles: int  # after warm-up
    max_plan_s: float
    mean_plan_s: float
    prefix_cache_queries: int  # prompt tokens of admitted requests
    prefix_cache_hits: int  # those of them whose KV was there
    num_output_tokens: int
    slo: SloCounts
    recent: RecentRequests
    prefill_error: PredictionError
    decode_error: PredictionError


type FromCoordinator = Refused | Admitted | Outputs | Stats | PartitionReply

# ---------------------------------------------------------------- launcher ⇄ children (JSON lines)


class Line(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of messages on pipes."""


class MemoryLayout(Line, frozen=True):
    """What the memory owner decided: sizes that every other process needs."""

    dtype: str
    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int  # including scratch page 0
    num_rows: int  # including scratch row 0
    weight_bytes: int
    kv_bytes: int
    eos_token_ids: tuple[int, ...]
    worker_fraction: float | None = None  # of the device's memory, for one worker's own use


class ChildSpec(Line, frozen=True):
    """First line on a child's standard input: everything it needs to know.

    `run_dir` is a private directory that holds the sockets. `layout` is absent for the memory
    owner, who makes it, and for whoever starts before it.
    """

    name: str
    run_dir: str
    config: EngineConfig
    platform: Platform = "cpu"
    layout: MemoryLayout | None = None
    lane: Lane | None = None
    share: float | None = None
    extra: dict[str, str] = {}


class WorkerLost(Line, frozen=True):
    """To the coordinator: this worker's process is gone; a replacement is being started. It is not
    to blame if it was asked to leave, for the fault of another one."""

    worker_id: str
    lane: Lane
    is_to_blame: bool = True


class Serve(Line, frozen=True):
    """To the front end: every process is ready."""

    layout: MemoryLayout


class WaitingFor(Line, frozen=True):
    """To the front end: parts that are not ready, and how far they are; none: all is well again."""

    parts: tuple[str, ...]


class Drain(Line, frozen=True):
    """To the front end: refuse new requests, finish the running ones, then exit."""


class ShareUnavailable(Line, frozen=True):
    """To the coordinator: no worker of this lane can be had at this share."""

    lane: Lane
    share: float


type ToChild = ChildSpec | WorkerLost | Serve | WaitingFor | Drain | ShareUnavailable


FROM_CACHE: Final = "from the compile cache"
"""Stage of a worker's progress that says how many of its programs it did not have to compile."""


class Progress(Line, frozen=True):
    stage: str
    done: int
    total: int
    detail: str = ""


class Ready(Line, frozen=True):
    """The child did its part of the start-up. The memory owner's carries the layout, the front
    end's says where it listens, a worker's what it holds of the host's memory for itself."""

    layout: MemoryLayout | None = None
    address: str | None = None
    http_address: str | None = None
    private_bytes: int | None = None


class Alive(Line, frozen=True):
    """The child's loop turns."""


class Stalled(Line, frozen=True):
    """From the coordinator: this worker holds a step for longer than the step timeout."""

    worker_id: str


class StartWorker(Line, frozen=True):
    """From the coordinator: a worker at a share that has none is wanted."""

    lane: Lane
    share: float


class RetireWorker(Line, frozen=True):
    """From the coordinator: this worker holds no step and will get none."""

    worker_id: str


class Failed(Line, frozen=True):
    """The child cannot go on. `kind` is the name of a class in `semipd_jax.errors`."""

    kind: str
    message: str


type ToLauncher = Stalled | StartWorker | RetireWorker
"""What the coordinator asks of the launcher."""

type FromChild = Progress | Ready | Failed | Alive | ToLauncher
