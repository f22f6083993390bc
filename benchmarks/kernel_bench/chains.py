"""Programs of many calls for `timing`: each call's result is the first argument of the next."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_bench.timing import Contender


def chained(
    call: Callable[..., Any], first: Any, rest: Sequence[tuple[Any, ...]], num_calls: int
) -> Contender:
    """call(call(call(first, *rest[0]), *rest[1]), …), compiled into one program.

    Args:
      call: returns what can be its first argument, which it may update in place.
      rest: further arguments, taken in turns. Together they should exceed the L2 cache.
    """

    @partial(jax.jit, donate_argnums=0)
    def program(first: Any, rest: Sequence[tuple[Any, ...]]) -> Any:
        for i in range(num_calls):
            first = call(first, *rest[i % len(rest)])
        return first

    latest = jax.tree.map(jnp.copy, first)

    def run(num_starts: int) -> None:
        nonlocal latest
        for _ in range(num_starts):
            latest = program(latest, rest)
        jax.block_until_ready(latest)

    return Contender(run, num_calls)
