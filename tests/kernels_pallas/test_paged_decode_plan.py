"""The plan deals every block that some row sees to one thread block, in equal runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.paged_decode_attention.plan import make_plan, segment_at

BLOCK = 16
lengths = st.lists(st.sampled_from([0, 0, 1, 15, 16, 17, 500]) | st.integers(0, 300), min_size=1)


@functools.cache
def jitted(window, num_heads, num_ctas):
    options = {"block": BLOCK, "num_heads": num_heads, "num_ctas": num_ctas}
    return jax.jit(functools.partial(make_plan, window=window, **options))


@functools.partial(jax.jit, static_argnames="num_heads")
def segment_from(position, row, end, rows, num_heads):
    return segment_at(position, row, end, rows_ref=rows, num_heads=num_heads)


def walk(plan, num_heads):
    """(thread block, segment) of all segments, as the kernels walk them."""
    for cta, (row, position, end) in enumerate(np.asarray(plan.ctas)):
        while position < end:
            segment, row = segment_from(position, row, end, plan.rows, num_heads)
            yield cta, type(segment)(*map(int, segment))
            position += segment.num_blocks


def visible_blocks(context_lens, window, num_heads):
    for row, length in enumerate(context_lens):
        keys = np.arange(length)[-window:] if window else np.arange(length)
        for head in range(num_heads):
            yield from ((row, head, block) for block in np.unique(keys // BLOCK))


@settings(max_examples=40)
@given(
    lengths.map(lambda x: (x * 6)[:6]),
    st.sampled_from([None, 1, 40]),
    st.sampled_from([(1, 1), (1, 7), (3, 4), (2, 30)]),
)
def test_every_visible_block_is_read_once(context_lens, window, heads_and_ctas):
    num_heads, num_ctas = heads_and_ctas
    plan = jitted(window, num_heads, num_ctas)(jnp.asarray(context_lens, jnp.int32))
    expected = list(visible_blocks(context_lens, window, num_heads))
    read, done, parts = [], np.zeros(num_ctas, int), {}
    for cta, segment in walk(plan, num_heads):
        assert segment.length == context_lens[segment.row]
        first = segment.first_block
        blocks = range(first, first + segment.num_blocks)
        read += [(segment.row, segment.head, block) for block in blocks]
        done[cta] += segment.num_blocks
        part = segment.row * num_heads + segment.head + cta
        parts.setdefault((segment.row, segment.head), []).append(part)
    assert read == expected  # and in order
    assert done.max() <= -(-len(expected) // num_ctas)

    numbers = [part for of_segment in parts.values() for part in of_segment]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers, default=0) < len(context_lens) * num_heads + num_ctas
    for index in np.ndindex(len(context_lens), num_heads):
        first, count = plan.parts[index]
        assert list(range(first, first + count)) == parts.get(index, [])
