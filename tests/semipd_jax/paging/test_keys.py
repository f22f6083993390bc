from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.paging.keys import PageKeys

PAGE_SIZE = 4
sequences = st.lists(st.integers(0, 3), min_size=PAGE_SIZE, max_size=6 * PAGE_SIZE)
salts = st.sampled_from(["", "a", "b"])


def keys(token_ids, salt=""):
    return list(PageKeys(PAGE_SIZE, salt).up_to(len(token_ids) // PAGE_SIZE, token_ids))


@given(sequences, salts, sequences, salts)
def test_two_pages_have_one_key_only_if_everything_up_to_their_end_is_equal(a, salt_a, b, salt_b):
    for i, key_a in enumerate(keys(a, salt_a)):
        for j, key_b in enumerate(keys(b, salt_b)):
            ends = (i + 1) * PAGE_SIZE, (j + 1) * PAGE_SIZE
            same = salt_a == salt_b and a[: ends[0]] == b[: ends[1]]
            assert (key_a == key_b) == same


@given(sequences, st.data())
def test_keys_do_not_depend_on_when_they_are_asked_for(tokens, data):
    whole, chain = keys(tokens), PageKeys(PAGE_SIZE, "")
    for end in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))):
        assert list(chain.up_to(end // PAGE_SIZE, tokens[:end])) == whole[: end // PAGE_SIZE]
    assert [chain.of(i, tokens) for i in reversed(range(len(whole)))] == whole[::-1]


def test_neighbouring_tokens_do_not_run_together():
    assert keys([1, 23, 4, 5]) != keys([12, 3, 4, 5])
    assert keys([2**31 - 1] * 4) != keys([0] * 4)


def test_a_salt_is_not_a_prefix_of_tokens():
    assert len({keys([1] * 4, salt)[0] for salt in ("", "a", "aa", "\0", "日")}) == 5
