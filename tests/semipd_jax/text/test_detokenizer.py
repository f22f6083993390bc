import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_tokenizers import BYTE_LEVEL_IDS

from semipd_jax.text.detokenizer import Detokenizer
from semipd_jax.text.tokenizer import Tokenizer

TEXT = st.text(st.sampled_from("the a.éßあ日😀👩‍👩‍👧\t\n ▁\x00\u0301\ufffd"), max_size=30)


def streamed(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(detokenizer.push([token_id]) for token_id in output), detokenizer.finish()]


def in_pieces(tokenizer: Tokenizer, prompt: list[int], pieces: list[list[int]], skip: bool) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return "".join([*map(detokenizer.push, pieces), detokenizer.finish()])


def added_text(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> str:
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    assume(not before.endswith("\ufffd"))
    return tokenizer.decode(prompt + output, skip_special_tokens=skip)[len(before) :]


def byte_level_ids() -> st.SearchStrategy[list[int]]:
    """Any ids, some past the vocabulary; often special tokens, single bytes, and characters spelled
    in single bytes, whole and cut."""
    spelled = TEXT.map(lambda text: [BYTE_LEVEL_IDS[byte] for byte in text.encode()])
    cut = st.tuples(spelled, st.integers(0, 3)).map(lambda pair: pair[0][pair[1] :])
    single = st.integers(0, 420) | st.integers(0, 3) | st.integers(2, 257)
    pieces = st.lists(single.map(lambda token_id: [token_id]) | cut, max_size=20)
    return pieces.map(lambda lists: [token_id for piece in lists for token_id in piece])


@given(prompt=byte_level_ids(), output=byte_level_ids(), skip=st.booleans())
def test_any_byte_level_tokens_give_what_the_tokenizer_decodes(
    byte_level: Tokenizer, prompt: list[int], output: list[int], skip: bool
):
    expected = added_text(byte_level, prompt, output, skip)
    assert "".join(streamed(byte_level, prompt, output, skip)) == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(prompt=byte_level_ids(), pieces=st.lists(byte_level_ids(), max_size=6), skip=st.booleans())
def test_tokens_that_come_together_give_what_they_give_one_by_one(
    name: str,
    prompt: list[int],
    pieces: list[list[int]],
    skip: bool,
    request: pytest.FixtureRequest,
):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    output = [token_id for piece in pieces for token_id in piece]
    one_by_one = "".join(streamed(tokenizer, prompt, output, skip))
    assert in_pieces(tokenizer, prompt, pieces, skip) == one_by_one


@given(prompt=TEXT, output=TEXT, skip=st.booleans())
def test_any_byte_fallback_text_gives_what_the_tokenizer_decodes(
    byte_fallback: Tokenizer, prompt: str, output: str, skip: bool
):
    prompt_ids = byte_fallback.encode(prompt)
    output_ids = byte_fallback.encode(output, add_special_tokens=False)
    expected = added_text(byte_fallback, prompt_ids, output_ids, skip)
    assert "".join(streamed(byte_fallback, prompt_ids, output_ids, skip)) == expected


@given(
    prompt=st.lists(st.integers(0, 340), max_size=8),
    output=st.lists(st.integers(0, 2) | st.integers(3, 130) | st.integers(259, 340), max_size=40),
    skip=st.booleans(),
)
def test_any_byte_fallback_tokens_without_broken_characters_give_what_the_tokenizer_decodes(
    byte_fallback: Tokenizer, prompt: list[int], output: list[int], skip: bool
):
    assume("\ufffd" not in byte_fallback.decode(prompt))
    expected = added_text(byte_fallback, prompt, output, skip)
    assert "".join(streamed(byte_fallback, prompt, output, skip)) == expected


@given(st.lists(st.integers(3, 258), max_size=30))
def test_a_broken_byte_does_not_undo_the_characters_around_it(
    byte_fallback: Tokenizer, output: list[int]
):
    pieces = streamed(byte_fallback, byte_fallback.encode("x"), output, True)
    assert "".join(pieces) == bytes(i - 3 for i in output).decode(errors="replace")


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(text=TEXT)
def test_characters_appear_whole_with_their_last_token(
    name: str, text: str, request: pytest.FixtureRequest
):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    assume("\ufffd" not in text)
    prompt = tokenizer.encode("x")
    output = tokenizer.encode(text, add_special_tokens=False)
    *pieces, rest = streamed(tokenizer, prompt, output, True)
    assert rest == ""
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_space_at_the_beginning_counts_only_after_text(byte_fallback: Tokenizer):
    the = byte_fallback.encode("the", add_special_tokens=False)
    assert byte_fallback.decode(the) == "the"
    assert "".join(streamed(byte_fallback, [], the, True)) == "the"
    assert "".join(streamed(byte_fallback, [1], the, True)) == "the"
    assert "".join(streamed(byte_fallback, [1, *the, 2, 2, 2, 2, 2], the, True)) == " the"
    emoji = [3 + byte for byte in "😀".encode()]
    assert "".join(streamed(byte_fallback, [], emoji + the, True)) == "😀 the"


def test_output_completes_the_last_character_of_the_prompt(
    byte_level: Tokenizer, byte_fallback: Tokenizer
):
    for tokenizer in (byte_level, byte_fallback):
        tokens = tokenizer.encode("日", add_special_tokens=False)[-3:]
        for cut in range(1, len(tokens)):
            assert streamed(tokenizer, tokens[:cut], tokens[cut:], True)[-2:] == ["日", ""]


def test_time_per_token_does_not_grow(byte_level: Tokenizer):
    """Neither for broken characters nor for tokens without text."""
    broken = BYTE_LEVEL_IDS[0x80]

    def seconds(token_id: int, length: int) -> float:
        started = time.thread_time()
        streamed(byte_level, [], [token_id] * length, True)
        return time.thread_time() - started

    for token_id in (broken, 0):
        short = min(seconds(token_id, 500) for _ in range(5))
        long = min(seconds(token_id, 10_000) for _ in range(3))
        assert long < 20 * short * 5  # quadratic time would be 400 times
