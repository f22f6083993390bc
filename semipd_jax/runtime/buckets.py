"""Static shapes: every step is padded to the smallest compiled bucket that holds it.

Few buckets, because each is a program to compile; sizes that double, so that a step computes less
than twice what it needs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from semipd_jax.config import Lane, SchedulerConfig
from semipd_jax.messages import MemoryLayout, Phase
from semipd_jax.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

_MIN_PREFILL_TOKENS: Final = 32
_PREFILL_GROWTH: Final = 2
_FEW_DECODE_ROWS: Final = 8
_TOKENS_PER_REQUEST: Final = 16  # below this mean chunk length, requests fill a bucket first


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The padded shape of a step.

    Attributes:
      num_tokens: T, query tokens; in decode the same as `num_rows`.
      num_rows: R of a prefill step, B of a decode step.
      table_width: M, pages per row.
      bias_width: logit biases per row.
      mask_width: 32-bit words of a row's token mask.
    """

    num_tokens: int
    num_rows: int
    table_width: int
    bias_width: int
    mask_width: int

    @property
    def parts(self) -> tuple["Bucket", ...]:
        return (self,)

    def holds(self, num_tokens: int, num_rows: int) -> bool:
        return num_tokens <= self.num_tokens and num_rows <= self.num_rows


@dataclass(frozen=True, slots=True)
class MixedBucket:
    """The padded shape of a mixed step: those of its two parts."""

    decode: Bucket
    prefill: Bucket

    @property
    def parts(self) -> tuple[Bucket, ...]:
        """In the order of the step's rows and tokens."""
        return self.decode, self.prefill

    @property
    def num_tokens(self) -> int:
        return self.decode.num_tokens + self.prefill.num_tokens

    @property
    def num_rows(self) -> int:
        return self.decode.num_rows + self.prefill.num_rows


type StepBucket = Bucket | MixedBucket

type Kind = Literal["prefill", "decode", "mixed"]
"""Of a step."""

_KINDS: Final[Mapping[Lane, tuple[Kind, ...]]] = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "colocated": ("prefill", "decode"),
    "chunked": ("prefill", "decode", "mixed"),
}


def lane_buckets(
    lane: Lane, layout: MemoryLayout, limits: SchedulerConfig
) -> dict[Kind, tuple[StepBucket, ...]]:
    """Those of every kind of step that workers of a lane run."""
    seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    of_kind: dict[Kind, tuple[StepBucket, ...]] = {
        "prefill": prefill_buckets(layout, seqs, tokens),
        "decode": decode_buckets(layout, seqs),
        "mixed": mixed_buckets(layout, seqs, tokens),
    }
    return {kind: of_kind[kind] for kind in _KINDS[lane]}


def padded_sizes(layout: MemoryLayout, limits: SchedulerConfig) -> dict[Phase, tuple[int, ...]]:
    """What numbers of tokens (of rows, in decode) are padded to."""
    seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    return {
        "prefill": tuple(b.num_tokens for b in prefill_buckets(layout, seqs, tokens)),
        "decode": tuple(b.num_rows for b in decode_buckets(layout, seqs)),
    }


def decode_buckets(layout: MemoryLayout, max_num_seqs: int) -> tuple[Bucket, ...]:
    """Rows 1, 4, 8, 16, … and `max_num_seqs`, smallest first. Two rows cost what four do."""
    sizes = [n for n in (1 << i for i in range(12)) if n != 2 and n < max_num_seqs]
    return tuple(_bucket(layout, n, n) for n in [*sizes, max_num_seqs])


def prefill_buckets(
    layout: MemoryLayout, max_num_seqs: int, max_num_batched_tokens: int
) -> tuple[Bucket, ...]:
    """Tokens 32, 64, 128, … and `max_num_batched_tokens`, smallest first, each with room for one
    request per 16 tokens; the largest takes any step that keeps to the two limits."""
    sizes = []
    size = _MIN_PREFILL_TOKENS
    while size < max_num_batched_tokens:
        sizes.append(size)
        size *= _PREFILL_GROWTH
    most_rows = min(max_num_seqs, max_num_batched_tokens)
    return (
        *(_bucket(layout, n, min(n // _TOKENS_PER_REQUEST, most_rows)) for n in sizes),
        _bucket(layout, max_num_batched_tokens, most_rows),
    )


def mixed_rows(max_num_seqs: int) -> tuple[int, ...]:
    """What the rows of a mixed step that decode are padded to: 8 or all, smallest first. Padding
    rows cost little beside a chunk."""
    return tuple(sorted({min(_FEW_DECODE_ROWS, max_num_seqs), max_num_seqs}))


def mixed_buckets(
    layout: MemoryLayout, max_num_seqs: int, max_num_batched_tokens: int
) -> tuple[MixedBucket, ...]:
    """Every prefill bucket with every number of rows that decode, fewest tokens first."""
    buckets = [
        MixedBucket(_bucket(layout, n, n), prefill)
        for n in mixed_rows(max_num_seqs)
        for prefill in prefill_buckets(layout, max_num_seqs, max_num_batched_tokens)
    ]
    return tuple(sorted(buckets, key=lambda bucket: bucket.num_tokens))


def choose(buckets: Sequence[StepBucket], *sizes: tuple[int, int]) -> StepBucket:
    """The smallest bucket that holds a step; raises ValueError if none does.

    Args:
      sizes: (tokens, rows) of each part of the step.
    """
    for bucket in buckets:
        if all(part.holds(*size) for part, size in zip(bucket.parts, sizes, strict=True)):
            return bucket
    most = [(part.num_tokens, part.num_rows) for part in buckets[-1].parts]
    raise ValueError(f"a step has {_in_words(sizes)}; allowed: at most {_in_words(most)}")


def _in_words(sizes: Iterable[tuple[int, int]]) -> str:
    return " and ".join(f"{tokens} tokens in {rows} rows" for tokens, rows in sizes)


def _bucket(layout: MemoryLayout, num_tokens: int, num_rows: int) -> Bucket:
    """The table has room for one page beyond the longest request: a step planned before a length
    limit was noticed may name it. Biases: what a client may ask for and the tokens that
    `min_tokens` forbids."""
    return Bucket(
        num_tokens=num_tokens,
        num_rows=num_rows,
        table_width=-(-(layout.max_model_len + 1) // layout.page_size),
        bias_width=MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + len(layout.eos_token_ids),
        mask_width=-(-layout.vocab_size // 32),
    )
