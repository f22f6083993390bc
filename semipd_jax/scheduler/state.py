"""Everything the coordinator knows: requests, rows, pages, steps in flight.

A request moves waiting → prefilling → decoding → gone. From `prefilling` on it holds a row (its
index in every per-row table, on the host and in shared memory) and pages. A preempted request goes
back to waiting with all its tokens; prefill then computes prompt and output again.

Plans (`scheduler.prefill`, `scheduler.decode`) only read it; `scheduler.scheduler` changes it.
"""

import enum
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float32, Int32

from semipd_jax.config import SchedulingPolicy
from semipd_jax.messages import ROW_SAMPLING
from semipd_jax.paging.keys import PageKeys
from semipd_jax.paging.pool import PagePool
from semipd_jax.paging.quarantine import Quarantine
from semipd_jax.request import Request

SCRATCH_ROW: Final = 0
MAX_CRASHES: Final = 3
"""Workers that may die in a row while running a step of the same request, before it is given up."""


class Stage(enum.Enum):
    WAITING = enum.auto()
    PREFILLING = enum.auto()
    DECODING = enum.auto()
    GONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Bias:
    """Logit biases of one request, ready to be sent."""

    token_ids: Int32[np.ndarray, " n"]
    values: Float32[np.ndarray, " n"]

    @classmethod
    def of(cls, biases: dict[int, float]) -> "Bias":
        return cls(np.array(list(biases), np.int32), np.array(list(biases.values()), np.float32))


@dataclass(slots=True)
class Constraint:
    """What the output of a request must be like.

    Attributes:
      matcher: whoever makes the masks knows it.
      mask: of the token after `RequestState.token_ids`, see `messages.TokenMasks`; None while it is
        made. No step samples for the request meanwhile.
    """

    matcher: Any
    mask: bytes | None


type Rank = tuple[int, float, int]
"""Place in the order of prefills, lower first: see `scheduler.order`."""


@dataclass(slots=True, eq=False)
class RequestState:
    """One request's life in the engine.

    Attributes:
      client, handle: who asked, and the client's number for it.
      number: position in the order of arrival.
      token_ids: prompt and output, as far as replies have come.
      max_len: most tokens in all, prompt included.
      stop_ids: tokens that end it.
      bias, bias_without_stops: from `min_tokens` on, and before.
      page_keys: of its full pages, for the prefix cache.
      constraint: None if its output is free.
      rank: its place in the queue while it waits.
      num_scheduled: leading tokens whose KV a sent step has written or will write, or was cached.
      found_pages: while it waits, the pages that had its leading tokens when it was queued; it does
        not hold them, see `SchedulerState.num_found`.
      num_cached: leading tokens whose KV was there when the request was last admitted.
      num_sealed: leading pages that are full, whose KV is known to be written: it writes them no
        more.
      steps: ids of steps in flight whose results still count for this request.
      admitted_at: position in the order of admission.
      num_crashes: workers lost in a row while they ran a step of this request.
    """

    client: str
    handle: int
    number: int
    request: Request
    arrival_s: float
    token_ids: list[int]
    max_len: int
    stop_ids: frozenset[int]
    bias: Bias
    bias_without_stops: Bias
    page_keys: PageKeys
    constraint: Constraint | None = None
    rank: Rank = (0, 0.0, 0)
    stage: Stage = Stage.WAITING
    row: int = SCRATCH_ROW
    page_ids: list[int] = field(default_factory=list[int])
    num_scheduled: int = 0
    found_pages: list[int] = field(default_factory=list[int])
    num_cached: int = 0
    num_sealed: int = 0
    steps: set[int] = field(default_factory=set[int])
    admitted_at: int = -1
    admitted_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0
    num_crashes: int = 0

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def is_suspect(self) -> bool:
        return self.num_crashes >= MAX_CRASHES - 1

    @property
    def lacks_mask(self) -> bool:
        return self.constraint is not None and self.constraint.mask is None

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a request, in one prefill step.

    Attributes:
      samples: they are the last ones it has.
      cached_pages: sealed pages that hold [0, start), if the request is to be admitted.
    """

    request: RequestState
    start: int
    end: int
    samples: bool
    cached_pages: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was planned and not answered.

    Attributes:
      requests: in the order of its rows; those that decode come before those of the chunks.
      chunks: what it prefills.
      filling: positions in `requests` of those that decode the last token of a page.
    """

    step_id: int
    requests: list[RequestState]
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    filling: list[int] = field(default_factory=list[int])

    @property
    def chunk_of_row(self) -> list[Chunk | None]:
        """None for rows that decode."""
        num_decoding = len(self.requests) - len(self.chunks)
        return [*[None] * num_decoding, *self.chunks]


class RowTable:
    """Per-row columns, indexed by row; what a decode step needs is one fancy index away.

    Attributes:
      active: the row decodes.
      context_lens: of the row's next decode step: tokens visible to it, its input included.
      max_context_lens: of the row's last decode step.
      num_pages: held by the row.
      num_shared_pages: the first ones of them that were cached when the request was admitted, or
        that requests admitted later took as well.
      has_bias: the row has a logit bias or a minimum length.
      is_suspect: one more crash of a worker that runs this row, and its request is given up.
    """

    def __init__(self, num_rows: int, table_width: int) -> None:
        self.page_table: Int32[np.ndarray, "rows M"] = np.zeros((num_rows, table_width), np.int32)
        self.sampling = np.zeros(num_rows, ROW_SAMPLING)
        self.active: Bool[np.ndarray, " rows"] = np.zeros(num_rows, np.bool_)
        self.context_lens: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.max_context_lens: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.num_pages: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.num_shared_pages: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.has_bias: Bool[np.ndarray, " rows"] = np.zeros(num_rows, np.bool_)
        self.is_suspect: Bool[np.ndarray, " rows"] = np.zeros(num_rows, np.bool_)
        self.is_constrained: Bool[np.ndarray, " rows"] = np.zeros(num_rows, np.bool_)
        self.awaits_mask: Bool[np.ndarray, " rows"] = np.zeros(num_rows, np.bool_)
        self.requests: list[RequestState | None] = [None] * num_rows

    def clear(self, row: int) -> None:
        self.page_table[row] = 0
        self.active[row] = False
        self.num_pages[row] = 0
        self.num_shared_pages[row] = 0
        self.has_bias[row] = False
        self.is_suspect[row] = False
        self.is_constrained[row] = False
        self.awaits_mask[row] = False
        self.requests[row] = None

    def num_common(self, page_ids: list[int]) -> Int32[np.ndarray, " rows"]:
        """How many of these pages each row begins with."""
        common = np.zeros(len(self.requests), np.int32)
        if page_ids:
            rows = np.flatnonzero(self.page_table[:, 0] == page_ids[0])
            is_same = self.page_table[rows, : len(page_ids)] == np.array(page_ids, np.int32)
            common[rows] = np.logical_and.accumulate(is_same, axis=1).sum(axis=1)
        return common

    def ready(self) -> Int32[np.ndarray, " n"]:
        """Rows that may generate another token now."""
        is_ready = self.active & (self.context_lens <= self.max_context_lens) & ~self.awaits_mask
        return is_ready.nonzero()[0].astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What plans respect; `num_pages` and `num_rows` include the scratch ones. See `config`."""

    page_size: int
    num_pages: int
    num_rows: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_queued_reqs: int
    max_num_queued_tokens: int | None = None
    policy: SchedulingPolicy = "fcfs"
    ageing_tokens_per_s: float = 2000.0
    enable_prefix_caching: bool = True


class SchedulerState:
    """
    Attributes:
      waiting: sorted by rank; `enqueue` and `dequeue` keep it so.
      growth_share: how much of what running requests may still generate has its pages kept free
        when others are admitted, 0 to 1: see `scheduler.watermark`.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pages = PagePool(limits.num_pages)
        self.free_rows = list(range(limits.num_rows - 1, SCRATCH_ROW, -1))
        self.quarantine = Quarantine()
        self.table = RowTable(limits.num_rows, pages_for(limits.max_model_len, limits.page_size))
        self.requests: dict[tuple[str, int], RequestState] = {}
        self.waiting: list[RequestState] = []
        self.prefilling: list[RequestState] = []
        self.in_flight: dict[int, StepInFlight] = {}
        self.growth_share = 0.0

    @property
    def decoding(self) -> list[RequestState]:
        rows = ints(np.flatnonzero(self.table.active))
        return [r for row in rows if (r := self.table.requests[row]) is not None]

    @property
    def is_decoding(self) -> bool:
        """Whether a step in flight decodes."""
        return any(len(s.requests) > len(s.chunks) for s in self.in_flight.values())

    @property
    def num_quarantined_pages(self) -> int:
        """Pages that nobody else holds: they come back when steps in flight are answered."""
        return self.pages.num_exclusive(self.quarantine.page_ids)

    def enqueue(self, request: RequestState, rank: Rank) -> None:
        request.rank = rank
        insort(self.waiting, request, key=_by_rank)

    def dequeue(self, request: RequestState) -> None:
        del self.waiting[bisect_left(self.waiting, request.rank, key=_by_rank)]

    def cached_pages(self, request: RequestState) -> list[int]:
        """Sealed pages that hold the request's first tokens; never all of its tokens, because the
        last one has to be computed for what follows it."""
        if not self.limits.enable_prefix_caching:
            return []
        most = (len(request.token_ids) - 1) // self.limits.page_size
        return self.pages.match(request.page_keys.up_to(most, request.token_ids))

    def num_found(self, request: RequestState, *, held: bool = False) -> int:
        """Leading tokens of a waiting request whose KV was there when it was queued and still is;
        with `held`, in pages that somebody holds. An estimate, for what has to be quick: it takes
        the end of a sequence to be given up, and let go of, before the beginning, which it is
        unless two requests computed the same pages at the same time."""

        def is_gone(i: int) -> bool:
            key = request.page_keys.of(i, request.token_ids)
            return not self.pages.has(request.found_pages[i], key, held=held)

        num_pages = bisect_left(range(len(request.found_pages)), True, key=is_gone)
        return num_pages * self.limits.page_size

    def check(self) -> None:
        """Recomputes every invariant; raises AssertionError. For tests."""
        held = [page for r in self.requests.values() for page in r.page_ids]
        self.pages.check([*held, *self.quarantine.page_ids])
        rows = [r.row for r in self.requests.values() if r.row != SCRATCH_ROW]
        all_rows = sorted([*self.free_rows, *rows, *self.quarantine.rows])
        assert all_rows == list(range(1, self.limits.num_rows)), f"rows: {all_rows}"
        for request in self.requests.values():
            self._check_request(request)
        for request in self.requests.values():
            for step_id in request.steps:
                assert request in self.in_flight[step_id].requests
        num_waiting = sum(r.stage is Stage.WAITING for r in self.requests.values())
        assert len(self.waiting) == num_waiting, "the queue holds requests that do not wait"
        assert self.waiting == sorted(self.waiting, key=_by_rank), "the queue is out of order"
        for step in self.in_flight.values():
            for chunk in step.chunks:
                if step.step_id in chunk.request.steps:
                    sealed = chunk.request.num_sealed * self.limits.page_size
                    assert chunk.start >= sealed, "a step in flight writes a sealed page"

    def _check_request(self, r: RequestState) -> None:
        table, page_size = self.table, self.limits.page_size
        waiting = r.stage is Stage.WAITING
        assert waiting == (r.row == SCRATCH_ROW) == (r in self.waiting)
        assert (r.stage is Stage.PREFILLING) == (r in self.prefilling)
        assert r.stage is not Stage.GONE
        if waiting:
            assert not r.page_ids
            assert not r.steps
            return
        assert table.requests[r.row] is r
        assert table.active[r.row] == (r.stage is Stage.DECODING)
        assert table.num_pages[r.row] == len(r.page_ids)
        assert table.page_table[r.row, : len(r.page_ids)].tolist() == r.page_ids
        assert not table.page_table[r.row, len(r.page_ids) :].any()
        assert len(r.page_ids) >= pages_for(r.num_scheduled, page_size)
        assert r.num_sealed * page_size <= r.num_scheduled
        own = r.page_ids[r.num_sealed :]
        assert all(map(self.pages.is_private, own)), "a page has two writers"
        assert len(r.token_ids) <= r.max_len
        assert table.is_constrained[r.row] == (r.constraint is not None)
        if r.constraint is not None and r.stage is Stage.DECODING:
            lacks_mask = bool(r.steps) or r.constraint.mask is None
            assert table.awaits_mask[r.row] == lacks_mask, "a mask must fit all tokens before it"
            assert len(r.steps) <= 1, "a constrained row is in two steps"


def _by_rank(request: RequestState) -> Rank:
    return request.rank


def ints(array: np.ndarray) -> list[int]:
    """A one-dimensional integer array as Python numbers."""
    return array.tolist()


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens take."""
    return -(-num_tokens // page_size)
