"""Inputs of the runtime for tests: a tiny model, sampling columns, step messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from semipd_jax.messages import (
    ROW_SAMPLING,
    DecodeStep,
    History,
    MemoryLayout,
    PrefillStep,
    TokenMasks,
)
from semipd_jax.models import module
from semipd_jax.models.registry import parse_spec
from semipd_jax.runtime.batch import Sampling
from semipd_jax.runtime.state import SharedState

PAGE_SIZE = 16

OFF = {"top_p": 1.0, "repetition_penalty": 1.0, "num_logprobs": -1}


def columns(num_rows, **changes):
    """ROW_SAMPLING of `num_rows` greedy rows; a change is a value or one per row."""
    table = np.zeros(num_rows, ROW_SAMPLING)
    for name, value in (OFF | changes).items():
        table[name] = value
    return table


def packed_mask(allowed, width):
    """The words of a token mask."""
    words = np.zeros(width, np.uint32)
    for token_id in allowed:
        words[token_id // 32] |= np.uint32(1 << token_id % 32)
    return words


def sampling(num_rows, *, bias=None, masks=None, **changes):
    """`bias`: for each row a dict of token id → value; `masks`: a mask or None for each row."""
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
        **_masks(masks or [None] * num_rows),
    )


def _masks(rows):
    given = [row for row in rows if row is not None] or [np.zeros(4096, np.uint32)]
    has_mask = np.array([row is not None for row in rows])
    ids = np.where(has_mask, np.cumsum(has_mask), 0)
    return {"mask_ids": jnp.asarray(ids.astype(np.int32)), "masks": (jnp.asarray(given),)}


def history(*rows, length=600):
    """The shared token array: row 0 is scratch, then the given rows, then -7 where unwritten."""
    tokens = np.full((len(rows) + 1, length), -7, np.int32)
    for i, row in enumerate(rows):
        tokens[i + 1, : len(row)] = row
    return jnp.asarray(tokens)


TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
"""config.json of two Llama layers, small enough to compile in a second."""


def tiny_spec():
    return parse_spec(TINY_CONFIG)


def tiny_layout(spec, *, num_pages=40, num_rows=9):
    return MemoryLayout(
        dtype="float32",
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        num_rows=num_rows,
        weight_bytes=0,
        kv_bytes=0,
        eos_token_ids=(1,),
    )


@functools.cache
def tiny_model():
    """(spec, graphdef, params), with weights that make greedy choices clear."""
    spec = tiny_spec()
    graphdef, abstract = module.abstract_params(spec, "float32")
    rng = np.random.default_rng(0)

    def fill(leaf):
        scale = 3.0 / leaf.shape[-1] ** 0.5 if len(leaf.shape) == 2 else 1.0
        return jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32) * scale)

    return spec, graphdef, jax.tree.map(fill, abstract)


@jax.jit
def dense_logits(token_ids):
    """The tiny model's next-token logits at every position, with plain causal attention."""
    spec, graphdef, params = tiny_model()

    def attend(q, k, v, cache, window):
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        scores = jnp.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
        visible = jnp.tri(len(q), dtype=bool)[None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("nts,snh->tnh", weights, v), cache

    model = module.merge(graphdef, params)
    positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    hidden, _ = model(token_ids, positions, [{}] * spec.num_layers, attend)
    return model.logits(hidden)


def dense_greedy(prompt, num_tokens):
    """What the tiny model generates."""
    token_ids = np.zeros(tiny_spec().max_model_len, np.int32)
    token_ids[: len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + num_tokens):
        token_ids[end] = np.argmax(dense_logits(jnp.asarray(token_ids))[end - 1])
    return token_ids[len(prompt) : len(prompt) + num_tokens].tolist()


def abstract_state(spec, layout):
    layer = {
        a.name: jax.ShapeDtypeStruct((layout.num_pages, *a.page_shape), jnp.dtype(layout.dtype))
        for a in spec.kv_layout(layout.page_size)
    }
    tokens = (layout.num_rows, layout.max_model_len + 1)
    return SharedState(
        layers=[dict(layer) for _ in range(spec.num_layers)],
        tokens=jax.ShapeDtypeStruct(tokens, jnp.int32),
    )


def zero_state(spec, layout):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_state(spec, layout))


def int32(values):
    return np.asarray(values, np.int32).tobytes()


def page_table(pages):
    """(width, bytes) of rows of page ids, padded with scratch page 0."""
    width = max(map(len, pages))
    return width, int32([[*row, *[0] * (width - len(row))] for row in pages])


def prefill_message(chunks, *, step_id=0, sampling=None, history=()):
    """`chunks`: (row, page ids, all token ids, start, end, samples) of each request; `history`:
    (row, token ids) of cached prefixes."""
    rows, pages, token_ids, starts, ends, samples = zip(*chunks, strict=True)
    lens = [end - start for start, end in zip(starts, ends, strict=True)]
    width, table = page_table(pages)
    return PrefillStep(
        step_id=step_id,
        token_ids=int32(
            [t for ids, s, e in zip(token_ids, starts, ends, strict=True) for t in ids[s:e]]
        ),
        cu_q_lens=int32(np.concatenate([[0], np.cumsum(lens)])),
        context_lens=int32(ends),
        rows=int32(rows),
        samples=np.array(samples, np.bool_).tobytes(),
        table_width=width,
        page_table=table,
        sampling=(columns(len(rows)) if sampling is None else sampling).tobytes(),
        history=tuple(History(row, int32(token_ids)) for row, token_ids in history),
    )


def token_masks(masks):
    """`TokenMasks` from place → words of a mask."""
    words = np.stack(list(masks.values()))
    return TokenMasks(words.shape[1], int32(list(masks)), words.tobytes())


def decode_message(requests, *, step_id=0, sampling=None, bias=None, masks=None):
    """`requests`: (row, page ids, context length) of each; `masks`: as in `token_masks`."""
    rows, pages, context_lens = zip(*requests, strict=True)
    width, table = page_table(pages)
    return DecodeStep(
        step_id=step_id,
        context_lens=int32(context_lens),
        rows=int32(rows),
        table_width=width,
        page_table=table,
        sampling=(columns(len(rows)) if sampling is None else sampling).tobytes(),
        bias=bias,
        masks=None if masks is None else token_masks(masks),
    )
