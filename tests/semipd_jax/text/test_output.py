import pytest

from semipd_jax.request import SamplingParams
from semipd_jax.text.output import OutputText
from semipd_jax.text.tokenizer import Tokenizer


def text_of(tokenizer: Tokenizer, text: str, sampling: SamplingParams) -> tuple[str, str | None]:
    output = OutputText(tokenizer, tokenizer.encode("x"), sampling)
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = [output.push([token_id]) for token_id in ids]
    return "".join([*texts, output.finish()]), output.matched_stop


def test_stop_strings_cut_detokenised_text(byte_level: Tokenizer):
    sampling = SamplingParams(stop=("zzz", "日本語"))
    assert text_of(byte_level, "in 日本 and 日本語のテキスト", sampling) == (
        "in 日本 and ",
        "日本語",
    )


def test_an_unfinished_stop_string_is_text_at_the_end(byte_level: Tokenizer):
    assert text_of(byte_level, "日本", SamplingParams(stop=("日本語",))) == ("日本", None)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_leaves_text_only_if_asked(byte_level: Tokenizer, include: bool):
    dog = byte_level.encode("the fox.", add_special_tokens=False)
    sampling = SamplingParams(stop_token_ids=(dog[-1],), include_stop=include)
    text, matched = text_of(byte_level, "the fox.", sampling)
    assert text == ("the fox." if include else byte_level.decode(dog[:-1]))
    assert matched is None


def test_stop_strings_are_not_looked_for_before_min_tokens(byte_level: Tokenizer):
    text = "the fox. the fox."
    first = len(byte_level.encode("the fox.", add_special_tokens=False))
    sampling = SamplingParams(stop=("fox",), min_tokens=first)
    assert text_of(byte_level, text, sampling) == ("the fox. the ", "fox")
    assert text_of(byte_level, text, SamplingParams(stop=("fox",))) == ("the ", "fox")
