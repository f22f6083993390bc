"""What a profile is measured by: steps of made-up requests, alone and side by side."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Final

import numpy as np

from semipd_jax.messages import ROW_SAMPLING, DecodeStep, MemoryLayout, Phase, PrefillStep
from semipd_jax.tuner.policy import Ladders

_ROW: Final = 1
_SHORT_CONTEXT: Final = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a step.

    Attributes:
      num_rows: 1 in prefill.
      num_tokens: per row; 1 in decode.
      context: tokens visible to each row at the end of the step.
    """

    phase: Phase
    num_rows: int
    num_tokens: int
    context: int

    def __str__(self) -> str:
        size = f"{self.num_tokens}" if self.phase == "prefill" else f"{self.num_rows}"
        return f"{self.phase} {size} @ {self.context}"


@dataclass(frozen=True, slots=True)
class Trial:
    """Steps of these shapes, each phase at its share, over and over."""

    shapes: dict[Phase, Shape]
    shares: dict[Phase, float] = field(default_factory=dict[Phase, float])

    def __str__(self) -> str:
        return " | ".join(f"{s}, share {self.shares[p]:.2f}" for p, s in self.shapes.items())


def trials(layout: MemoryLayout, max_batched_tokens: int, ladders: Ladders) -> Iterator[Trial]:
    """Every shape alone at every share, then small and large steps beside each other at every pair
    of shares."""
    prefills = prefill_shapes(layout, max_batched_tokens)
    decodes = decode_shapes(layout)
    for shape in (*prefills, *decodes):
        for share in ladders.of(shape.phase):
            yield Trial({shape.phase: shape}, {shape.phase: share})
    pairs = [(prefills[-1], decodes[-1]), (prefills[-1], decodes[0]), (prefills[0], decodes[-1])]
    for (prefill, decode), x, y in product(pairs, ladders.prefill, ladders.decode):
        yield Trial({"prefill": prefill, "decode": decode}, {"prefill": x, "decode": y})


def prefill_shapes(layout: MemoryLayout, max_batched_tokens: int) -> list[Shape]:
    """From a short prompt to a full chunk at the end of the longest one."""
    longest = layout.max_model_len - 1
    most = min(max_batched_tokens, longest)
    sizes = sorted({max(most // part, 1) for part in (16, 4, 2, 1)})
    contexts = {n: sorted({n, min(4 * n, longest), longest}) for n in sizes}
    return [Shape("prefill", 1, n, c) for n in sizes for c in contexts[n]]


def decode_shapes(layout: MemoryLayout) -> list[Shape]:
    """From one row to all of them, few ones too, each time with short and long contexts, as far as
    the pool holds them."""
    tokens = (layout.num_pages - 1) * layout.page_size
    longest = layout.max_model_len - 1
    most = layout.num_rows - 1
    sizes = sorted({1, max(most // 8, 1), max(most // 2, 1), most})
    return [
        Shape("decode", rows, 1, context)
        for rows in sizes
        for context in sorted(
            {min(c, longest, tokens // rows) for c in (_SHORT_CONTEXT, longest // 4, longest)}
        )
        if context > 0
    ]


def step_of(shape: Shape, step_id: int, layout: MemoryLayout) -> PrefillStep | DecodeStep:
    """Its tokens and KV are whatever is there, and its pages belong to several rows where the pool
    does not hold all: only its time is meant."""
    rows = np.arange(_ROW, _ROW + shape.num_rows, dtype=np.int32)
    contexts = np.full(shape.num_rows, shape.context, np.int32)
    width = -(-shape.context // layout.page_size)
    pages = 1 + np.arange(shape.num_rows * width, dtype=np.int32) % (layout.num_pages - 1)
    sampling = np.zeros(shape.num_rows, ROW_SAMPLING)
    for name, value in (("top_p", 1), ("repetition_penalty", 1), ("num_logprobs", -1)):
        sampling[name] = value
    sampling["prompt_len"] = shape.context
    if shape.phase == "decode":
        return DecodeStep(
            step_id=step_id,
            context_lens=contexts.tobytes(),
            rows=rows.tobytes(),
            table_width=width,
            page_table=pages.tobytes(),
            sampling=sampling.tobytes(),
        )
    tokens = np.arange(shape.num_tokens, dtype=np.int32) % layout.vocab_size
    return PrefillStep(
        step_id=step_id,
        token_ids=tokens.tobytes(),
        cu_q_lens=np.array([0, shape.num_tokens], np.int32).tobytes(),
        context_lens=contexts.tobytes(),
        rows=rows.tobytes(),
        samples=np.ones(1, np.bool_).tobytes(),
        table_width=width,
        page_table=pages.tobytes(),
        sampling=sampling.tobytes(),
    )
