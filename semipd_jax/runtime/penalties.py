"""Changes to logits that depend on what the row holds already, and logit biases."""

from typing import Final

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from semipd_jax.runtime.batch import Sampling

_HISTORY_BLOCK: Final = 256


def adjust(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    tokens: Int32[Array, "rows length"],
    rows: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
) -> Float32[Array, "B V"]:
    """Biases, then penalties for `tokens[rows, :context_lens]`."""
    return penalise(add_bias(logits, sampling), sampling, tokens, rows, context_lens)


def add_bias(logits: Float32[Array, "B V"], sampling: Sampling) -> Float32[Array, "B V"]:
    ids = sampling.bias_token_ids
    columns = jnp.where(ids < 0, logits.shape[1], ids)  # a negative index would count from the end
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, columns].add(sampling.bias_values, mode="drop")


def uses_penalties(sampling: Sampling) -> Bool[Array, " B"]:
    return (
        (sampling.repetition_penalty != 1.0)
        | (sampling.presence_penalty != 0.0)
        | (sampling.frequency_penalty != 0.0)
    )


def penalise(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    tokens: Int32[Array, "rows length"],
    rows: Int32[Array, " B"],
    context_lens: Int32[Array, " B"],
) -> Float32[Array, "B V"]:
    """Repetition penalty, then frequency and presence penalties.

    Repetition (CTRL, arXiv 1909.05858; as in Hugging Face) divides positive and multiplies negative
    logits of every token of the prompt and the output. Frequency and presence (OpenAI) count
    generated tokens only.
    """
    prompt, output = _count_tokens(
        tokens,
        rows,
        jnp.where(uses_penalties(sampling), context_lens, 0),
        sampling,
        logits.shape[1],
    )
    repetition = sampling.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(prompt + output > 0, repeated, logits)
    logits = logits - sampling.frequency_penalty[:, None] * output.astype(jnp.float32)
    return logits - sampling.presence_penalty[:, None] * (output > 0).astype(jnp.float32)


def _count_tokens(
    tokens: Int32[Array, "rows length"],
    rows: Int32[Array, " B"],
    lens: Int32[Array, " B"],
    sampling: Sampling,
    vocab_size: int,
) -> tuple[Int32[Array, "B V"], Int32[Array, "B V"]]:
    """How often each token is among the row's first `lens`, in the prompt and in the output.

    Reads block by block up to the longest row, so that the work follows the real lengths.
    """
    num_rows = rows.shape[0]
    row_index = jnp.arange(num_rows, dtype=jnp.int32)[:, None]

    def add_block(i: Array, counts: Int32[Array, "2 B V"]) -> Int32[Array, "2 B V"]:
        positions = (i * _HISTORY_BLOCK + jnp.arange(_HISTORY_BLOCK, dtype=jnp.int32))[None, :]
        ids = tokens.at[rows[:, None], positions].get(mode="clip")
        ids = jnp.where(positions < lens[:, None], ids, vocab_size)
        is_output = (positions >= sampling.prompt_len[:, None]).astype(jnp.int32)
        return counts.at[is_output, row_index, ids].add(1, mode="drop")

    num_blocks = (jnp.max(lens) + _HISTORY_BLOCK - 1) // _HISTORY_BLOCK
    start = jnp.zeros((2, num_rows, vocab_size), jnp.int32)
    counts = lax.fori_loop(0, num_blocks, add_block, start)
    return counts[0], counts[1]
