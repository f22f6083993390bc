import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.text.stop import StopStrings

AB = st.text("ab", min_size=1, max_size=5)


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, on the whole text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    pieces=st.lists(st.text("ab", max_size=6), max_size=8),
    stops=st.lists(AB, max_size=4),
    include=st.booleans(),
)
def test_any_split_is_cut_where_the_whole_text_would_be(
    pieces: list[str], stops: list[str], include: bool
):
    strings = StopStrings(stops, include_stop=include)
    passed = [strings.push(piece) for piece in pieces]
    text, matched = cut("".join(pieces), stops, include)
    assert strings.matched == matched
    assert "".join(passed) + strings.finish() == text


@given(pieces=st.lists(st.text("ab", max_size=6)), stops=st.lists(AB, min_size=1, max_size=4))
def test_no_more_is_held_back_than_the_beginning_of_a_stop_string(
    pieces: list[str], stops: list[str]
):
    strings = StopStrings(stops)
    passed = "".join(strings.push(piece) for piece in pieces)
    held = strings.finish()
    assert passed + held == cut("".join(pieces), stops, include=False)[0]
    assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(("include", "expected"), [(False, "say "), (True, "say stop!")])
def test_a_stop_string_across_pieces(include: bool, expected: str):
    strings = StopStrings(["stop!"], include_stop=include)
    assert strings.push("say st") == "say "
    assert strings.push("op") == ""
    assert strings.push("! and more") == expected.removeprefix("say ")
    assert strings.matched == "stop!"
    assert strings.push("even more") == ""
    assert strings.finish() == ""


def test_a_false_beginning_is_released():
    strings = StopStrings(["stop!"])
    assert [strings.push("st"), strings.push("art")] == ["", "start"]


def test_without_stop_strings_everything_passes_at_once():
    strings = StopStrings([])
    assert strings.push("text") == "text"
    assert strings.finish() == ""
