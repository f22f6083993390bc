"""The tokens of a cached prefix, put where steps look for a row's history.

Prefill does not compute them again, so no chunk brings them; penalties count them all the same.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from semipd_jax.config import Platform
from semipd_jax.messages import History
from semipd_jax.runtime.compile import COMPILER_OPTIONS
from semipd_jax.runtime.guard import check_in_place
from semipd_jax.runtime.state import SharedState


def compile_restore(state: SharedState, platform: Platform) -> jax.stages.Compiled:
    """(state.tokens, words) → tokens, donated, with one row overwritten: see `pack_history`.

    Raises SharingError if the program would not update them in place.

    Args:
      state: of arrays or `jax.ShapeDtypeStruct`s.
    """
    tokens = state.tokens
    length = tokens.shape[1]
    compiled = (
        jax.jit(_restore, donate_argnums=0)
        .lower(tokens, jax.ShapeDtypeStruct((1 + length,), jnp.int32))
        .compile(dict(COMPILER_OPTIONS[platform]))
    )
    check_in_place(compiled, replace(state, layers=[]), length)
    return compiled


def pack_history(history: History, length: int) -> Int32[np.ndarray, " words"]:
    """The row, then its tokens. Those after the given ones are not there yet: zeros."""
    words = np.zeros(1 + length, np.int32)
    token_ids = np.frombuffer(history.token_ids, "<i4")
    words[0], words[1 : 1 + len(token_ids)] = history.row, token_ids
    return words


def _restore(
    tokens: Int32[Array, "rows length"], words: Int32[Array, " words"]
) -> Int32[Array, "rows length"]:
    return lax.dynamic_update_slice(tokens, words[None, 1:], (words[0], jnp.int32(0)))
