import pytest

from semipd_jax.messages import MemoryLayout
from semipd_jax.runtime import buckets

LAYOUT = MemoryLayout(
    dtype="float32",
    vocab_size=100,
    max_model_len=64,
    page_size=16,
    num_pages=10,
    num_rows=9,
    weight_bytes=0,
    kv_bytes=0,
    eos_token_ids=(1, 2),
)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 12, 256, 4096])
def test_every_decode_batch_has_a_bucket_little_larger_than_itself(max_num_seqs):
    all_buckets = buckets.decode_buckets(LAYOUT, max_num_seqs)
    for n in range(1, max_num_seqs + 1):
        bucket = buckets.choose(all_buckets, (n, n))
        assert n <= bucket.num_rows <= min(max(4, 2 * n), max_num_seqs)


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens"), [(1, 16), (32, 16), (4, 40), (32, 512), (8, 8192)]
)
def test_every_prefill_step_within_the_limits_has_a_bucket(max_num_seqs, max_num_batched_tokens):
    all_buckets = buckets.prefill_buckets(LAYOUT, max_num_seqs, max_num_batched_tokens)
    assert len(all_buckets) <= 9
    for num_tokens in range(1, max_num_batched_tokens + 1, 7):
        for num_rows in {1, min(num_tokens, max_num_seqs)}:
            buckets.choose(all_buckets, (num_tokens, num_rows))
        lone = buckets.choose(all_buckets, (num_tokens, 1))
        assert lone.num_tokens <= max(32, 2 * num_tokens - 1)


def test_a_step_that_is_too_large_is_refused_with_its_size_and_the_limit():
    all_buckets = buckets.decode_buckets(LAYOUT, 8)
    with pytest.raises(ValueError, match="9 tokens in 9 rows; allowed: at most 8 tokens in 8 rows"):
        buckets.choose(all_buckets, (9, 9))


def test_the_page_table_has_room_for_one_token_more_than_the_model():
    (bucket,) = buckets.decode_buckets(LAYOUT, 1)
    assert bucket.table_width == 5
