"""From logits to one token per row, and its log-probabilities.

Order of operations, as in vLLM: logit bias, penalties, token masks, temperature, then min-p and
top-k, then top-p. Log-probabilities are of the model's own logits, before any of it.

A feature that no row of the batch uses is skipped at run time inside the one compiled program.
"""

from typing import Final, no_type_check

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from semipd_jax.request import MAX_LOGPROBS
from semipd_jax.runtime import masking, penalties, rng, selection, truncation
from semipd_jax.runtime.batch import Sampling

_GREEDY_BELOW: Final = 1e-5
"""Temperatures below are greedy: vLLM's limit."""

type _Logprobs = tuple[
    Float32[Array, " B"], Int32[Array, "B MAX_LOGPROBS"], Float32[Array, "B MAX_LOGPROBS"]
]


@no_type_check
@flax.struct.dataclass
class StepOutput:
    """What a step tells the host. Log-probabilities are zeros where no row asked for any."""

    token_ids: Int32[Array, " B"]
    logprobs: Float32[Array, " B"]
    top_ids: Int32[Array, "B MAX_LOGPROBS"]
    top_logprobs: Float32[Array, "B MAX_LOGPROBS"]


def empty_output(num_rows: int) -> StepOutput:
    """Of a step that samples nothing."""
    return StepOutput(jnp.zeros((num_rows,), jnp.int32), *_no_logprobs(num_rows))


def sample(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    tokens: Int32[Array, "rows length"],
    rows: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
) -> StepOutput:
    """Chooses `tokens[rows, context_lens]`, given the tokens before that position."""
    adjusted = lax.cond(
        jnp.any(sampling.bias_token_ids >= 0) | jnp.any(penalties.uses_penalties(sampling)),
        lambda: penalties.adjust(logits, sampling, tokens, rows, context_lens),
        lambda: logits,
    )
    adjusted = lax.cond(
        jnp.any(sampling.mask_ids > 0),
        lambda: masking.apply(adjusted, sampling.mask_ids, sampling.masks),
        lambda: adjusted,
    )
    greedy = selection.argmax(adjusted)
    is_random = sampling.temperature >= _GREEDY_BELOW
    token_ids = lax.cond(
        jnp.any(is_random),
        lambda: jnp.where(is_random, draw(adjusted, sampling, context_lens), greedy),
        lambda: greedy,
    )
    logprobs, top_ids, top_logprobs = lax.cond(
        jnp.any(sampling.num_logprobs >= 0),
        lambda: _logprobs(logits, token_ids),
        lambda: _no_logprobs(logits.shape[0]),
    )
    return StepOutput(token_ids, logprobs, top_ids, top_logprobs)


def draw(
    logits: Float32[Array, "B V"], sampling: Sampling, positions: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """A random token of each row at its temperature, truncated, by (seed, position)."""
    temperature = jnp.maximum(sampling.temperature, _GREEDY_BELOW)
    scores = (logits - jnp.max(logits, axis=1, keepdims=True)) / temperature[:, None]
    weights = jnp.exp(scores)
    truncates = (sampling.top_k > 0) | (sampling.top_p < 1.0) | (sampling.min_p > 0.0)
    least = lax.cond(
        jnp.any(truncates),
        lambda: truncation.threshold(
            scores, weights, sampling.top_k, sampling.top_p, sampling.min_p
        ),
        lambda: jnp.full_like(temperature, -jnp.inf),
    )
    weights = jnp.where(scores >= least[:, None], weights, 0.0)
    return selection.categorical(weights, *rng.uniform_pair(sampling.seed, positions))


def _logprobs(logits: Float32[Array, "B V"], token_ids: Int32[Array, " B"]) -> _Logprobs:
    top = jnp.max(logits, axis=1)
    norm = top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=1))
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1, mode="clip")[:, 0]
    best, best_ids = selection.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - best.shape[1]))
    return chosen - norm, jnp.pad(best_ids, missing), jnp.pad(best - norm[:, None], missing)


def _no_logprobs(num_rows: int) -> _Logprobs:
    return (
        jnp.zeros((num_rows,), jnp.float32),
        jnp.zeros((num_rows, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((num_rows, MAX_LOGPROBS), jnp.float32),
    )
