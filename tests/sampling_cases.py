"""Sampling inputs for tests: columns with everything off, one keyword per thing that is on."""

import jax.numpy as jnp
import numpy as np

from semipd_jax.messages import ROW_SAMPLING
from semipd_jax.runtime.batch import Sampling

OFF = {"top_p": 1.0, "repetition_penalty": 1.0, "num_logprobs": -1}


def columns(num_rows, **changes):
    """ROW_SAMPLING of `num_rows` greedy rows; a change is a value or one per row."""
    table = np.zeros(num_rows, ROW_SAMPLING)
    for name, value in (OFF | changes).items():
        table[name] = value
    return table


def sampling(num_rows, *, bias=None, **changes):
    """`bias`: for each row a dict of token id → value."""
    table = columns(num_rows, **changes)
    biases = bias or [{}] * num_rows
    width = max(1, *(len(b) for b in biases))
    token_ids = np.full((num_rows, width), -1, np.int32)
    values = np.zeros((num_rows, width), np.float32)
    for i, row in enumerate(biases):
        token_ids[i, : len(row)] = list(row)
        values[i, : len(row)] = list(row.values())
    return Sampling(
        **{name: jnp.asarray(table[name]) for name in ROW_SAMPLING.names},
        bias_token_ids=jnp.asarray(token_ids),
        bias_values=jnp.asarray(values),
    )


def history(*rows, length=600):
    """The shared token array: row 0 is scratch, then the given rows, then -7 where unwritten."""
    tokens = np.full((len(rows) + 1, length), -7, np.int32)
    for i, row in enumerate(rows):
        tokens[i + 1, : len(row)] = row
    return jnp.asarray(tokens)
