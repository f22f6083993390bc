"""What a step computes, in the few numbers that its time depends on."""

from dataclasses import dataclass

import numpy as np

from semipd_jax.messages import DecodeStep, Phase, PrefillStep


@dataclass(frozen=True, slots=True)
class Work:
    """
    Attributes:
      num_rows: requests in the step.
      num_tokens: query tokens; one for each row of a decode step.
      context_tokens: visible tokens summed over rows: the KV that attention reads.
      num_pairs: pairs of a query token and a token that it sees.
    """

    phase: Phase
    num_rows: int
    num_tokens: int
    context_tokens: int
    num_pairs: int


def work_of(step: PrefillStep | DecodeStep) -> Work:
    context_lens = np.frombuffer(step.context_lens, "<i4")
    num_rows, context_tokens = context_lens.size, int(context_lens.sum())
    if isinstance(step, DecodeStep):
        return Work("decode", num_rows, num_rows, context_tokens, context_tokens)
    query_lens = np.diff(np.frombuffer(step.cu_q_lens, "<i4")).astype(np.int64)
    # Query i of q, after c - q earlier tokens, sees c - q + i + 1 of them.
    pairs = query_lens * (context_lens - query_lens) + query_lens * (query_lens + 1) // 2
    return Work("prefill", num_rows, int(query_lens.sum()), context_tokens, int(pairs.sum()))
