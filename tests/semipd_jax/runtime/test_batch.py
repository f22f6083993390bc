import jax.numpy as jnp
import numpy as np
import pytest
from step_cases import columns, packed_mask, token_masks

from semipd_jax.messages import ROW_SAMPLING, DecodeStep, LogitBias, PrefillStep
from semipd_jax.runtime import batch
from semipd_jax.runtime.buckets import Bucket

BUCKET = Bucket(num_tokens=8, num_rows=4, table_width=3, bias_width=5, mask_width=3)
NO_MASKS = tuple(map(jnp.asarray, batch.pack_masks(None, BUCKET)))


def int32(*values):
    return np.array(values, np.int32).tobytes()


def prefill(**changes):
    fields = {
        "step_id": 1,
        "token_ids": int32(11, 12, 13, 14, 15),
        "cu_q_lens": int32(0, 2, 5),
        "context_lens": int32(2, 9),
        "rows": int32(3, 1),
        "samples": np.array([False, True]).tobytes(),
        "table_width": 2,
        "page_table": int32(7, 0, 4, 5),
        "sampling": columns(2, temperature=[0.5, 0.25], seed=[1, 2**32 - 1]).tobytes(),
    }
    return PrefillStep(**fields | changes)


def test_prefill_batch_holds_the_step_and_harmless_padding():
    got = batch.unpack_prefill(
        jnp.asarray(batch.pack_prefill(prefill(), BUCKET)),
        jnp.asarray(batch.pack_bias(None, BUCKET)),
        NO_MASKS,
        BUCKET,
    )
    assert got.token_ids.tolist() == [11, 12, 13, 14, 15, 0, 0, 0]
    assert got.cu_q_lens.tolist() == [0, 2, 5, 5, 5]
    assert got.context_lens.tolist() == [2, 9, 0, 0]
    assert got.rows.tolist() == [3, 1, 0, 0]
    assert got.samples.tolist() == [False, True, False, False]
    assert got.page_table.tolist() == [[7, 0, 0], [4, 5, 0], [0] * 3, [0] * 3]
    assert got.sampling.temperature.tolist() == [0.5, 0.25, 0, 0]
    assert got.sampling.seed.tolist() == [1, 2**32 - 1, 0, 0]
    assert got.sampling.repetition_penalty.tolist() == [1] * 4
    assert got.sampling.num_logprobs.tolist() == [-1] * 4
    assert got.sampling.bias_token_ids.tolist() == [[-1] * 5] * 4


def test_every_sampling_column_survives():
    rng = np.random.default_rng(0)
    table = np.frombuffer(rng.bytes(3 * ROW_SAMPLING.itemsize), ROW_SAMPLING)
    step = DecodeStep(
        step_id=1,
        context_lens=int32(1, 2, 3),
        rows=int32(1, 2, 3),
        table_width=1,
        page_table=int32(1, 2, 3),
        sampling=table.tobytes(),
    )
    got = batch.unpack_decode(
        jnp.asarray(batch.pack_decode(step, BUCKET)),
        jnp.asarray(batch.pack_bias(None, BUCKET)),
        NO_MASKS,
        BUCKET,
    )
    for name in ROW_SAMPLING.names:
        column = np.asarray(getattr(got.sampling, name))
        assert column.dtype == ROW_SAMPLING[name]
        assert column[:3].tobytes() == table[name].tobytes()


def test_biases_survive():
    values = np.array([[1.5, -np.inf], [0.0, 0.0]], np.float32)
    bias = LogitBias(width=2, token_ids=int32(3, 9, -1, -1), values=values.tobytes())
    packed = jnp.asarray(batch.pack_bias(bias, BUCKET))
    words = jnp.asarray(batch.pack_prefill(prefill(), BUCKET))
    got = batch.unpack_prefill(words, packed, NO_MASKS, BUCKET)
    assert got.sampling.bias_token_ids.tolist() == [[3, 9, -1, -1, -1]] + [[-1] * 5] * 3
    assert got.sampling.bias_values[0].tolist() == [1.5, -np.inf, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table_width": 4, "page_table": int32(*range(8))}, "page_table .* allowed"),
        ({"token_ids": int32(*range(9))}, "token_ids .* allowed"),
        ({"rows": int32(*range(5))}, "rows .* allowed"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batch.pack_prefill(prefill(**changes), BUCKET)


def test_biases_that_do_not_fit_are_refused():
    bias = LogitBias(width=6, token_ids=int32(*range(6)), values=bytes(24))
    with pytest.raises(ValueError, match=r"bias .* allowed"):
        batch.pack_bias(bias, BUCKET)


@pytest.mark.parametrize("num_rows", [1, 4, 8, 9, 16, 17, 64, 100, 256])
def test_mask_arrays_hold_every_row_and_few_are_brought_for_few_masks(num_rows):
    bucket = Bucket(num_rows, num_rows, 1, 1, 3)
    counts = batch.mask_counts(bucket)
    assert sum(counts) == num_rows
    for num_masks in {1, num_rows // 2, num_rows} - {0}:
        words = np.random.default_rng(0).integers(0, 2**32, (num_masks, 3), np.uint32)
        step_masks = token_masks(dict(enumerate(words)))
        brought = batch.pack_masks(step_masks, bucket)
        assert tuple(map(len, brought)) == counts[: len(brought)]
        np.testing.assert_array_equal(np.concatenate(brought)[:num_masks], words)
        assert sum(map(len, brought)) <= max(8, 2 * num_masks)


def test_each_row_finds_its_mask():
    first, last = packed_mask([3, 95], 3), packed_mask([32], 3)
    step = prefill(masks=token_masks({1: first, 0: last}))
    masks = tuple(map(jnp.asarray, batch.pack_masks(step.masks, BUCKET)))
    words = jnp.asarray(batch.pack_prefill(step, BUCKET))
    bias = jnp.asarray(batch.pack_bias(None, BUCKET))
    got = batch.unpack_prefill(words, bias, masks, BUCKET).sampling
    assert got.mask_ids.tolist() == [2, 1, 0, 0]
    np.testing.assert_array_equal(np.concatenate(got.masks)[:2], [first, last])


def test_masks_that_do_not_fit_are_refused():
    too_wide = token_masks({0: packed_mask([1], 4)})
    with pytest.raises(ValueError, match=r"masks .* allowed"):
        batch.pack_masks(too_wide, BUCKET)
