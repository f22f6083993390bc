"""The steps against a dense forward pass of the same module, and what they may write."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_cases import (
    PAGE_SIZE,
    abstract_state,
    columns,
    decode_message,
    dense_greedy,
    prefill_message,
    tiny_layout,
    tiny_model,
    zero_state,
)

from semipd_jax.messages import MixedStep
from semipd_jax.runtime import batch
from semipd_jax.runtime.buckets import Bucket, MixedBucket, decode_buckets
from semipd_jax.runtime.compile import compile_step

SPEC, GRAPHDEF, PARAMS = tiny_model()
LAYOUT = tiny_layout(SPEC)
PREFILL = Bucket(num_tokens=32, num_rows=4, table_width=7, bias_width=4, mask_width=3)
DECODE = Bucket(num_tokens=4, num_rows=4, table_width=7, bias_width=4, mask_width=3)
MIXED = MixedBucket(DECODE, PREFILL)


@functools.cache
def program(kind, bucket):
    state = abstract_state(SPEC, LAYOUT)
    return compile_step(kind, GRAPHDEF, PARAMS, state, bucket, "cpu")


def run_prefill(state, message):
    return _run("prefill", PREFILL, state, batch.pack_prefill(message, PREFILL))


def run_decode(state, message, bucket=DECODE):
    return _run("decode", bucket, state, batch.pack_decode(message, bucket))


def run_mixed(state, decode, prefill):
    """Tokens of the rows that decode, and of those of the chunks."""
    packed = batch.pack_mixed(MixedStep(decode, prefill), MIXED)
    tokens, state = _run("mixed", MIXED, state, packed)
    return tokens[: DECODE.num_rows], tokens[DECODE.num_rows :], state


def _run(kind, bucket, state, packed):
    leaves = jax.tree.leaves(PARAMS)
    none = [None] * len(bucket.parts)
    no_masks = [batch.pack_masks(None, part) for part in bucket.parts]
    bias, masks = batch.pack_biases(none, bucket), tuple(itertools.chain(*no_masks))
    output, state = program(kind, bucket)(leaves, state, packed, bias, masks)
    return np.asarray(output.token_ids).tolist(), state


def copy(state):
    return jax.tree.map(lambda a: jnp.asarray(np.array(a)), state)


class Request:
    """A prompt with shuffled pages of its own, cut into random chunks."""

    def __init__(self, row, prompt, page_ids, cuts):
        self.row, self.prompt, self.pages = row, prompt, page_ids
        bounds = [0, *sorted(cuts), len(prompt)]
        self.chunks = [(s, e) for s, e in itertools.pairwise(bounds) if s < e]
        self.output = []

    def next_chunk(self):
        start, end = self.chunks.pop(0)
        return (self.row, self.pages, self.prompt, start, end, not self.chunks)

    def decode_row(self):
        return self.row, self.pages, len(self.prompt) + len(self.output)


def random_requests(rng, num_requests):
    pages = (1 + rng.permutation(LAYOUT.num_pages - 1)).tolist()
    requests = []
    for row in 1 + rng.permutation(LAYOUT.num_rows - 1)[:num_requests]:
        length = int(rng.integers(1, 60))
        prompt = rng.integers(2, SPEC.vocab_size, length).tolist()
        cuts = {*range(0, length, 24), *rng.integers(0, length, 2).tolist()}
        own = [pages.pop() for _ in range(-(-(length + 13) // PAGE_SIZE))]
        requests.append(Request(int(row), prompt, own, cuts))
    return requests


def generate(state, requests, num_tokens, rng):
    """Prefills in batches of chunks, decodes in random batches, or both in one step, until all have
    enough."""
    while any(len(r.output) < num_tokens for r in requests):
        waiting = [r for r in requests if r.chunks and rng.random() < 0.7]
        running = [r for r in requests if r.output and len(r.output) < num_tokens]
        running = [running[i] for i in rng.permutation(len(running))[: DECODE.num_rows]]
        chunked, room = [], PREFILL.num_tokens
        for r in waiting[: PREFILL.num_rows]:
            room -= r.chunks[0][1] - r.chunks[0][0]
            chunked += [r] if room >= 0 else []
        decode = decode_message([r.decode_row() for r in running]) if running else None
        prefill = prefill_message([r.next_chunk() for r in chunked]) if chunked else None
        decoded, sampled = [], []
        if decode and prefill and rng.random() < 0.7:
            decoded, sampled, state = run_mixed(state, decode, prefill)
        else:
            if prefill:
                sampled, state = run_prefill(state, prefill)
            if decode:
                decoded, state = run_decode(state, decode)
        for r, token in zip(running, decoded, strict=False):
            r.output.append(token)
        for r, token in zip(chunked, sampled, strict=False):
            r.output += [] if r.chunks else [token]
    return state


@pytest.mark.parametrize("seed", range(5))
def test_greedy_tokens_equal_a_dense_forward_pass(seed):
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, 6)
    state = generate(zero_state(SPEC, LAYOUT), requests, 12, rng)
    for r in requests:
        assert r.output == dense_greedy(r.prompt, 12)
        written = np.asarray(state.tokens)[r.row]
        assert written[: len(r.prompt) + 12].tolist() == r.prompt + r.output


def prefilled(seed=0, num_requests=3):
    """Some requests after prefill and one decode step, and the state that holds them."""
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, num_requests)
    return requests, generate(zero_state(SPEC, LAYOUT), requests, 2, rng)


RANDOM = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.1, "seed": [5, 6, 7]}


def test_running_a_step_again_changes_nothing():
    requests, state = prefilled()
    message = decode_message(
        [r.decode_row() for r in requests], sampling=columns(len(requests), **RANDOM)
    )
    first, state = run_decode(state, message)
    once = copy(state)
    second, state = run_decode(state, message)
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, state, once)

    chunk = prefill_message(
        [(r.row, r.pages, r.prompt, 0, min(10, len(r.prompt)), True) for r in requests],
        sampling=columns(len(requests), **RANDOM),
    )
    first, state = run_prefill(state, chunk)
    once = copy(state)
    second, state = run_prefill(state, chunk)
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, state, once)


def changed_slots(before, after):
    """(page, offset) of every KV slot that differs, in any layer."""
    slots = set()
    for old, new in zip(jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True):
        page, _, offset, _ = np.nonzero(np.asarray(old) != np.asarray(new))
        slots |= set(zip(page.tolist(), offset.tolist(), strict=True))
    return slots


def changed_tokens(before, after):
    row, position = np.nonzero(np.asarray(before.tokens) != np.asarray(after.tokens))
    return set(zip(row.tolist(), position.tolist(), strict=True))


def slot(pages, position):
    return pages[position // PAGE_SIZE], position % PAGE_SIZE


def test_decode_writes_its_own_slots_and_nothing_else():
    requests, state = prefilled()
    before = copy(state)
    _, after = run_decode(state, decode_message([r.decode_row() for r in requests]))
    positions = [len(r.prompt) + len(r.output) for r in requests]
    own = {slot(r.pages, p - 1) for r, p in zip(requests, positions, strict=True)}
    assert changed_slots(before, after) == own
    assert changed_tokens(before, after) <= {
        (r.row, p) for r, p in zip(requests, positions, strict=True)
    }


@pytest.mark.parametrize("samples", [False, True])
def test_prefill_writes_its_own_slots_and_nothing_else(samples):
    state = zero_state(SPEC, LAYOUT)
    pages, prompt = [9, 3], list(range(40, 70))
    before = copy(state)
    _, after = run_prefill(state, prefill_message([(4, pages, prompt, 0, 20, samples)]))
    assert changed_slots(before, after) == {slot(pages, p) for p in range(20)}
    assert changed_tokens(before, after) == {(4, p) for p in range(20 + samples)}


@pytest.mark.parametrize("samples", [False, True])
def test_a_mixed_step_is_both_steps_and_writes_nothing_else(samples):
    requests, state = prefilled()
    rows = [r.decode_row() for r in requests]
    free = sorted({*range(1, LAYOUT.num_pages)} - {p for r in requests for p in r.pages})
    row = next(row for row in range(1, LAYOUT.num_rows) if row not in [r.row for r in requests])
    table = columns(len(rows), **RANDOM)
    decode = decode_message(rows, sampling=table)
    chunk = [(row, free[:2], list(range(40, 70)), 0, 20, samples)]
    prefill = prefill_message(chunk, sampling=columns(1, temperature=1.0, seed=3))
    before = copy(state)
    decoded, sampled, together = run_mixed(copy(state), decode, prefill)
    again = run_mixed(copy(together), decode, prefill)
    assert again[:2] == (decoded, sampled), "a step that runs again gives other tokens"
    expected, apart = run_decode(state, decode)
    assert decoded[: len(rows)] == expected[: len(rows)]
    expected, apart = run_prefill(apart, prefill)
    assert not samples or sampled[0] == expected[0]
    assert changed_slots(before, together) == changed_slots(before, apart)
    np.testing.assert_array_equal(np.asarray(together.tokens), np.asarray(apart.tokens))
    for ours, theirs in zip(*map(jax.tree.leaves, (together.layers, apart.layers)), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)


def test_tokens_do_not_depend_on_bucket_or_row_order():
    requests, state = prefilled()
    rows = [r.decode_row() for r in requests]
    table = columns(len(rows), **RANDOM)
    together, _ = run_decode(copy(state), decode_message(rows, sampling=table))
    shuffled, _ = run_decode(copy(state), decode_message(rows[::-1], sampling=table[::-1]))
    assert shuffled[: len(rows)] == together[: len(rows)][::-1]
    (one_row,) = decode_buckets(LAYOUT, 1)
    for i, row in enumerate(rows):
        alone, _ = run_decode(
            copy(state), decode_message([row], sampling=table[i : i + 1]), one_row
        )
        assert alone[0] == together[i]
