"""Batches: what the step functions read besides weights and shared state.

A step message becomes one vector of 32-bit words, one array of biases and a few of token masks, so
that a step costs one upload (the biases and masks of a step that has none stay on the device).
`pack_*` runs on the host with NumPy, `unpack_*` inside the compiled step; both follow the same
table of fields.

Padding: a padding request has row 0, page 0 and `context_lens` 0, and no tokens. Padding tokens lie
beyond `cu_q_lens[-1]`.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from math import prod
from typing import Any, Final, NamedTuple, no_type_check

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from semipd_jax.messages import (
    ROW_SAMPLING,
    DecodeStep,
    LogitBias,
    MixedStep,
    PrefillStep,
    TokenMasks,
)
from semipd_jax.runtime.buckets import Bucket, MixedBucket, StepBucket

_SAMPLING_WORDS: Final = ROW_SAMPLING.itemsize // 4
_NO_SAMPLING: Final = np.zeros(1, ROW_SAMPLING)
_NO_SAMPLING["top_p"] = _NO_SAMPLING["repetition_penalty"] = 1.0
_NO_SAMPLING["num_logprobs"] = -1

_FIRST_MASKS: Final = 8  # a smaller upload takes no less time

type Masks = tuple[UInt32[Array, "_ mask_width"], ...]
"""Token masks, one after another, in arrays of 8, 8, 16, 32, … (`mask_counts`): a step brings those
that its masks take, and for the rest the ones that are on the device already."""


@no_type_check
@flax.struct.dataclass
class Sampling:
    """`messages.ROW_SAMPLING` by column, biases and masks. `bias_token_ids` is padded with -1;
    `mask_ids` is one more than the place of the row's mask in `masks`, or 0 if it has none."""

    temperature: Float32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    seed: UInt32[Array, " B"]
    prompt_len: Int32[Array, " B"]
    num_logprobs: Int32[Array, " B"]
    bias_token_ids: Int32[Array, "B W"]
    bias_values: Float32[Array, "B W"]
    mask_ids: Int32[Array, " B"]
    masks: Masks


@no_type_check
@flax.struct.dataclass
class PrefillBatch:
    """A chunk for each of R requests, packed one after another. See `messages.PrefillStep`."""

    token_ids: Int32[Array, " T"]
    cu_q_lens: Int32[Array, " R+1"]
    context_lens: Int32[Array, " R"]
    rows: Int32[Array, " R"]
    samples: Bool[Array, " R"]
    page_table: Int32[Array, "R M"]
    sampling: Sampling


@no_type_check
@flax.struct.dataclass
class DecodeBatch:
    """One token for each of B rows. See `messages.DecodeStep`."""

    context_lens: Int32[Array, " B"]
    rows: Int32[Array, " B"]
    page_table: Int32[Array, "B M"]
    sampling: Sampling


class MixedBatch(NamedTuple):
    """See `messages.MixedStep`."""

    decode: DecodeBatch
    prefill: PrefillBatch


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the parts of a bucket's packed batch lie.

    Attributes:
      parts: name → (place in the vector, shape), in order.
      padding: the vector of a step without requests.
    """

    parts: Mapping[str, tuple[slice, tuple[int, ...]]]
    padding: Int32[np.ndarray, " words"]


@functools.cache
def prefill_packing(bucket: Bucket) -> Packing:
    R = bucket.num_rows
    return _lay_out(
        {
            "token_ids": (bucket.num_tokens,),
            "cu_q_lens": (R + 1,),
            "context_lens": (R,),
            "rows": (R,),
            "samples": (R,),
            "page_table": (R, bucket.table_width),
            "sampling": (R, _SAMPLING_WORDS),
            "mask_ids": (R,),
        }
    )


@functools.cache
def decode_packing(bucket: Bucket) -> Packing:
    B = bucket.num_rows
    return _lay_out(
        {
            "context_lens": (B,),
            "rows": (B,),
            "page_table": (B, bucket.table_width),
            "sampling": (B, _SAMPLING_WORDS),
            "mask_ids": (B,),
        }
    )


def pack_prefill(step: PrefillStep, bucket: Bucket) -> Int32[np.ndarray, " words"]:
    """Raises ValueError if the step does not fit into the bucket."""
    cu_q_lens = np.full(bucket.num_rows + 1, len(step.token_ids) // 4, np.int32)
    cu_q_lens[: len(step.cu_q_lens) // 4] = _int32(step.cu_q_lens)
    return _pack(
        prefill_packing(bucket),
        {
            "token_ids": _int32(step.token_ids),
            "cu_q_lens": cu_q_lens,
            "context_lens": _int32(step.context_lens),
            "rows": _int32(step.rows),
            "samples": np.frombuffer(step.samples, np.bool_),
            "page_table": _int32(step.page_table).reshape(-1, step.table_width),
            "sampling": _int32(step.sampling).reshape(-1, _SAMPLING_WORDS),
            "mask_ids": _mask_ids(step),
        },
    )


def pack_decode(step: DecodeStep, bucket: Bucket) -> Int32[np.ndarray, " words"]:
    """Raises ValueError if the step does not fit into the bucket."""
    return _pack(
        decode_packing(bucket),
        {
            "context_lens": _int32(step.context_lens),
            "rows": _int32(step.rows),
            "page_table": _int32(step.page_table).reshape(-1, step.table_width),
            "sampling": _int32(step.sampling).reshape(-1, _SAMPLING_WORDS),
            "mask_ids": _mask_ids(step),
        },
    )


def pack_mixed(step: MixedStep, bucket: MixedBucket) -> Int32[np.ndarray, " words"]:
    """Raises ValueError if the step does not fit into the bucket."""
    return np.concatenate(
        [pack_decode(step.decode, bucket.decode), pack_prefill(step.prefill, bucket.prefill)]
    )


def prefill_padding(bucket: Bucket) -> Int32[np.ndarray, " words"]:
    """What a step without requests is packed to; so do the others."""
    return prefill_packing(bucket).padding


def decode_padding(bucket: Bucket) -> Int32[np.ndarray, " words"]:
    return decode_packing(bucket).padding


def mixed_padding(bucket: MixedBucket) -> Int32[np.ndarray, " words"]:
    return np.concatenate([decode_padding(bucket.decode), prefill_padding(bucket.prefill)])


def pack_biases(
    biases: Sequence[LogitBias | None], bucket: StepBucket
) -> Int32[np.ndarray, "B 2 W"]:
    """Those of a step's parts, one after another. Raises ValueError if they do not fit."""
    packed = [pack_bias(bias, part) for bias, part in zip(biases, bucket.parts, strict=True)]
    return np.concatenate(packed)


def pack_step_masks(
    masks: Sequence[TokenMasks | None], bucket: StepBucket, none: Sequence[Sequence[Any]]
) -> tuple[Any, ...]:
    """All arrays of `Masks` of a step's parts: where they take none, those of `none`.

    Args:
      none: of each part `pack_masks(None, …)`, on the host or on the device.
    """
    arrays: list[Any] = []
    for own, part, rest in zip(masks, bucket.parts, none, strict=True):
        packed = [] if own is None else pack_masks(own, part)
        arrays += [*packed, *rest[len(packed) :]]
    return tuple(arrays)


def pack_bias(bias: LogitBias | None, bucket: Bucket) -> Int32[np.ndarray, "B 2 W"]:
    """Token ids and the bits of the values. Raises ValueError if the biases do not fit."""
    packed = np.zeros((bucket.num_rows, 2, bucket.bias_width), np.int32)
    packed[:, 0] = -1
    if bias is not None:
        token_ids = _int32(bias.token_ids).reshape(-1, bias.width)
        _require_fit("bias", token_ids.shape, (bucket.num_rows, bucket.bias_width))
        corner = slice(len(token_ids)), slice(None), slice(bias.width)
        packed[corner] = np.stack([token_ids, _int32(bias.values).reshape(token_ids.shape)], axis=1)
    return packed


def mask_counts(bucket: Bucket) -> tuple[int, ...]:
    """Rows of each array of `Masks`. All together they have room for every row of the bucket."""
    counts = [min(_FIRST_MASKS, bucket.num_rows)]
    while (total := sum(counts)) < bucket.num_rows:
        counts.append(min(total, bucket.num_rows - total))
    return tuple(counts)


def pack_masks(
    masks: TokenMasks | None, bucket: Bucket
) -> list[UInt32[np.ndarray, "_ mask_width"]]:
    """The first arrays of `Masks`: as many as the step's masks take, all of them if it has none.

    Raises ValueError if the masks do not fit.
    """
    words = np.zeros((0, bucket.mask_width), np.uint32)
    if masks is not None:
        words = np.frombuffer(masks.words, "<u4").reshape(-1, masks.width)
        _require_fit("masks", words.shape, (bucket.num_rows, bucket.mask_width))
    packed: list[np.ndarray] = []
    start = 0
    for count in mask_counts(bucket):
        if masks is not None and start >= len(words):
            break
        part = np.zeros((count, bucket.mask_width), np.uint32)
        given = words[start : start + count]
        part[: len(given), : words.shape[1]] = given
        packed.append(part)
        start += count
    return packed


def unpack_prefill(
    packed: Int32[Array, " words"], bias: Int32[Array, "R 2 W"], masks: Masks, bucket: Bucket
) -> PrefillBatch:
    parts = _unpack(prefill_packing(bucket), packed)
    sampling = _sampling(parts.pop("sampling"), bias, parts.pop("mask_ids"), masks)
    return PrefillBatch(**parts | {"samples": parts["samples"] != 0}, sampling=sampling)


def unpack_decode(
    packed: Int32[Array, " words"], bias: Int32[Array, "B 2 W"], masks: Masks, bucket: Bucket
) -> DecodeBatch:
    parts = _unpack(decode_packing(bucket), packed)
    sampling = _sampling(parts.pop("sampling"), bias, parts.pop("mask_ids"), masks)
    return DecodeBatch(sampling=sampling, **parts)


def unpack_mixed(
    packed: Int32[Array, " words"], bias: Int32[Array, "B 2 W"], masks: Masks, bucket: MixedBucket
) -> MixedBatch:
    first, second = bucket.parts
    words, rows, arrays = decode_padding(first).size, first.num_rows, len(mask_counts(first))
    return MixedBatch(
        decode=unpack_decode(packed[:words], bias[:rows], masks[:arrays], first),
        prefill=unpack_prefill(packed[words:], bias[rows:], masks[arrays:], second),
    )


def join_sampling(parts: Sequence[Sampling]) -> Sampling:
    """The rows and masks of several, one after another."""
    if len(parts) == 1:
        return parts[0]
    columns = {
        column.name: jnp.concatenate([getattr(part, column.name) for part in parts])
        for column in fields(Sampling)
        if column.name not in ("mask_ids", "masks")
    }
    masks = [part.masks for part in parts]
    starts = accumulate((sum(map(len, arrays)) for arrays in masks), initial=0)
    ids = [
        jnp.where(part.mask_ids > 0, part.mask_ids + start, 0)
        for part, start in zip(parts, starts, strict=False)
    ]
    return Sampling(**columns, mask_ids=jnp.concatenate(ids), masks=tuple(chain(*masks)))


def _lay_out(shapes: Mapping[str, tuple[int, ...]]) -> Packing:
    parts: dict[str, tuple[slice, tuple[int, ...]]] = {}
    start = 0
    for name, shape in shapes.items():
        parts[name] = slice(start, start + prod(shape)), shape
        start += prod(shape)
    padding = np.zeros(start, np.int32)
    place, shape = parts["sampling"]
    padding[place].reshape(shape)[:] = _NO_SAMPLING.view("<i4")
    return Packing(parts, padding)


def _pack(packing: Packing, values: Mapping[str, np.ndarray]) -> Int32[np.ndarray, " words"]:
    packed = packing.padding.copy()
    for name, (place, shape) in packing.parts.items():
        value = values[name]
        _require_fit(name, value.shape, shape)
        packed[place].reshape(shape)[tuple(map(slice, value.shape))] = value
    return packed


def _unpack(packing: Packing, packed: Int32[Array, " words"]) -> dict[str, Array]:
    return {name: packed[place].reshape(shape) for name, (place, shape) in packing.parts.items()}


def _mask_ids(step: PrefillStep | DecodeStep) -> Int32[np.ndarray, " B"]:
    ids = np.zeros(len(step.rows) // 4, np.int32)
    if step.masks is not None:
        places = _int32(step.masks.places)
        ids[places] = np.arange(1, len(places) + 1, dtype=np.int32)
    return ids


def _sampling(
    columns: Int32[Array, "B columns"],
    bias: Int32[Array, "B 2 W"],
    mask_ids: Int32[Array, " B"],
    masks: Masks,
) -> Sampling:
    return Sampling(
        **{
            name: lax.bitcast_convert_type(columns[:, i], jnp.dtype(dtype))
            for i, (name, dtype) in enumerate(ROW_SAMPLING.descr)
        },
        bias_token_ids=bias[:, 0],
        bias_values=lax.bitcast_convert_type(bias[:, 1], jnp.float32),
        mask_ids=mask_ids,
        masks=masks,
    )


def _int32(data: bytes) -> Int32[np.ndarray, " n"]:
    return np.frombuffer(data, "<i4")


def _require_fit(name: str, shape: tuple[int, ...], room: tuple[int, ...]) -> None:
    if any(n > most for n, most in zip(shape, room, strict=True)):
        raise ValueError(f"{name} of a step has shape {shape}; allowed: at most {room}")
