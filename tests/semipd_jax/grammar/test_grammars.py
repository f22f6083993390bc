"""Masks against languages that are enumerated by brute force, over a byte-level vocabulary."""

import itertools
import json
import re
import time

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_fallback_bpe, byte_level_bpe

from semipd_jax.grammar import grammars
from semipd_jax.grammar.grammars import Grammars
from semipd_jax.grammar.matcher import GrammarError
from semipd_jax.request import SamplingParams, StructuredOutputs

TOKENIZER = byte_level_bpe()
EOS = TOKENIZER.token_to_id("<|eos|>")
SIZE = TOKENIZER.get_vocab_size()
VOCAB_SIZE = SIZE + 13  # models pad theirs
TEXTS = {i: TOKENIZER.decode([i]) for i in range(2, SIZE)}
GRAMMARS = Grammars(TOKENIZER.to_str(), VOCAB_SIZE, (EOS,))


def sampling(*, stop=(EOS,), min_tokens=0, **form) -> SamplingParams:
    return SamplingParams(
        structured_outputs=StructuredOutputs(**form), stop_token_ids=stop, min_tokens=min_tokens
    )


def allowed(mask: bytes, vocab_size: int = VOCAB_SIZE) -> set[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    assert len(bits) == -(-vocab_size // 32) * 32
    return set(np.flatnonzero(bits).tolist())


def expected(text: str, language: set[str]) -> set[int]:
    """Tokens after which the text is the beginning of one of the language."""
    rests = [other[len(text) :] for other in language if other.startswith(text)]
    ids = {i for i, t in TEXTS.items() if t and any(r.startswith(t) for r in rests)}
    return ids | ({EOS} if text in language else set())


def walk(language: set[str], data: st.DataObject, **form) -> None:
    """One random text, with its mask checked at each token."""
    matcher, mask = GRAMMARS.matcher(sampling(**form))
    text = ""
    while mask is not None:
        ids = allowed(mask)
        assert ids == expected(text, language), text
        token = data.draw(st.sampled_from(sorted(ids)))
        if token == EOS:
            return
        text += TEXTS[token]
        matcher.accept(token)
        mask = matcher.mask()
    assert text in language
    assert expected(text, language) == {EOS}, "it ended, but could have gone on"


ASCII = st.text("abct_", min_size=1, max_size=6)
REGEXES = st.recursive(
    st.sampled_from(["a", "b", "c", "[ab]", "[^abd-z]", "."]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        inner.map("({})?".format),
        inner.map("({}){{1,2}}".format),
    ),
    max_leaves=3,
)
ALPHABET = "abc"


@settings(max_examples=60)
@given(texts=st.lists(ASCII, min_size=1, max_size=6, unique=True), data=st.data())
def test_a_choice_is_its_texts(texts, data):
    walk(set(texts), data, choice=tuple(texts))


@settings(max_examples=30)
@given(text=st.text(min_size=1, max_size=8).filter(lambda t: t.isprintable()))
def test_a_choice_may_be_any_text(text):
    """Whatever its characters mean in a grammar."""
    matcher, mask = GRAMMARS.matcher(sampling(choice=(text,)))
    output = []
    while mask is not None:
        output.append(max(allowed(mask)))
        matcher.accept(output[-1])
        mask = matcher.mask()
    assert TOKENIZER.decode(output) == text


@pytest.mark.parametrize("text", ["hello  wörld", " 日本 x", "a"])
def test_byte_fallback_spells_what_follows_a_prompt(text):
    tokenizer = byte_fallback_bpe()
    eos = tokenizer.token_to_id("</s>")
    grammars = Grammars(tokenizer.to_str(), tokenizer.get_vocab_size(), (eos,))
    matcher, mask = grammars.matcher(sampling(stop=(eos,), choice=(text,)))
    output = tokenizer.encode("x").ids
    while mask is not None:
        output.append(max(allowed(mask, tokenizer.get_vocab_size())))
        matcher.accept(output[-1])
        mask = matcher.mask()
    assert tokenizer.decode(output) == "x" + text


@settings(max_examples=60)
@given(regex=REGEXES, data=st.data())
def test_a_regular_expression_is_the_texts_that_match(regex, data):
    """Among texts of an alphabet; a token of others may also be right."""
    longest = 12
    matcher, mask = GRAMMARS.matcher(sampling(regex=regex)) if regex else (None, None)
    texts = ("".join(t) for n in range(7) for t in itertools.product(ALPHABET, repeat=n))
    language = {text for text in texts if re.fullmatch(regex, text)}
    text = ""
    while mask is not None and len(text) < longest:
        ids = allowed(mask)
        plain = {i for i in ids if i == EOS or set(TEXTS[i]) <= set(ALPHABET)}
        known = {i for i in plain if i == EOS or len(text + TEXTS[i]) <= 4}
        want = {i for i in expected(text, language) if i == EOS or len(text + TEXTS[i]) <= 4}
        assert known == want, text
        if not plain:
            return
        token = data.draw(st.sampled_from(sorted(plain)))
        if token == EOS:
            break
        text += TEXTS[token]
        matcher.accept(token)
        mask = matcher.mask()
    if mask is None:
        assert re.fullmatch(regex, text)


JSON_VALUES = st.one_of(
    st.integers(-20, 200), st.booleans(), st.none(), st.text('abc"\\é', max_size=4)
)


@settings(max_examples=30)
@given(values=st.lists(JSON_VALUES, min_size=1, max_size=4), data=st.data())
def test_an_enum_is_its_values(values, data):
    unique = {json.dumps(value): value for value in values}
    texts = {json.dumps(v, ensure_ascii=False) for v in unique.values()}
    matcher, mask = GRAMMARS.matcher(sampling(json=json.dumps({"enum": [*unique.values()]})))
    output = []
    while mask is not None:
        ids = sorted(allowed(mask) - {EOS})
        if not ids:
            break
        output.append(data.draw(st.sampled_from(ids)))
        matcher.accept(output[-1])
        mask = matcher.mask()
    assert json.loads(TOKENIZER.decode(output)) in [json.loads(text) for text in texts]


@settings(max_examples=30)
@given(bounds=st.tuples(st.integers(-150, 150), st.integers(0, 40)), data=st.data())
def test_bounds_of_an_integer_are_kept(bounds, data):
    low, high = bounds[0], sum(bounds)
    schema = {"type": "integer", "minimum": low, "maximum": high}
    language = {str(i) for i in range(low, high + 1)}
    if low < 0 <= high:
        language.add("-0")  # JSON has two ways to write 0
    walk(language, data, json=json.dumps(schema))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-f]{1,3}$"},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3},
        "kind": {"anyOf": [{"const": "x"}, {"$ref": "#/$defs/pair"}]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
    "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "null"}], "maxItems": 2}},
}


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_random_walk_through_a_schema_is_accepted_by_it(seed):
    rng = np.random.default_rng(seed)
    matcher, mask = GRAMMARS.matcher(sampling(json=json.dumps(SCHEMA)))
    output = []
    for _ in range(600):
        if mask is None:
            break
        token = int(rng.choice(sorted(allowed(mask))))
        if token == EOS:
            break
        output.append(token)
        matcher.accept(token)
        mask = matcher.mask()
    else:
        return  # numbers may be long
    jsonschema.validate(json.loads(TOKENIZER.decode(output)), SCHEMA)


def test_white_space_in_json_ends():
    matcher, _ = GRAMMARS.matcher(sampling(json='{"type": "object"}'))
    space, brace = (TOKENIZER.token_to_id(t) for t in ("Ġ", "{"))
    matcher.accept(brace)
    num_spaces = 0
    while space in allowed(matcher.mask()):
        matcher.accept(space)
        num_spaces += 1
    assert num_spaces == 32


# ---------------------------------------------------------------- how an output ends


def token(text: str) -> int:
    return TOKENIZER.token_to_id(text)


def test_nothing_stops_before_min_tokens_unless_the_form_is_complete():
    matcher, mask = GRAMMARS.matcher(sampling(regex="a{1,3}", min_tokens=2))
    for num_tokens in (1, 2):
        assert EOS not in allowed(mask)
        matcher.accept(token("a"))
        mask = matcher.mask()
        assert num_tokens == 1 or allowed(mask) == {token("a"), EOS}
    short, mask = GRAMMARS.matcher(sampling(regex="a", min_tokens=5))
    short.accept(token("a"))
    assert short.mask() is None


def test_end_of_sequence_is_not_sampled_by_a_request_that_ignores_it():
    matcher, mask = GRAMMARS.matcher(sampling(regex="a?b?", stop=()))
    assert allowed(mask) == {token("a"), token("b")}
    matcher.accept(token("a"))
    assert allowed(matcher.mask()) == {token("b")}
    matcher.accept(token("b"))
    assert matcher.mask() is None


def test_a_stop_token_is_sampled_where_its_text_may_stand():
    a, b = token("a"), token("b")
    _, mask = GRAMMARS.matcher(sampling(regex="ab", stop=(EOS, b)))
    assert allowed(mask) == {a}
    matcher, _ = GRAMMARS.matcher(sampling(regex="ab", stop=(EOS, b)))
    matcher.accept(a)
    assert allowed(matcher.mask()) == {b}


def test_matchers_of_one_form_are_apart():
    first, mask = GRAMMARS.matcher(sampling(regex="ab"))
    first.accept(token("a"))
    _, again = GRAMMARS.matcher(sampling(regex="ab"))
    assert again == mask
    assert allowed(first.mask()) == {token("b")}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "no text"),
        ({"json": '{"not": {}}'}, "not"),
        ({"json": '{"type": "array", "uniqueItems": true}'}, "uniqueItems"),
        ({"json": '{"type": "array", "uniqueItems": true, "x-guidance": {"lenient": true}}'}, "un"),
        ({"json": '{"type": "text"}'}, "text"),
        ({"json": '{"$ref": "http://127.0.0.1:1/x"}'}, "retriev"),
        ({"json": '{"$ref": "#/nowhere"}'}, "nowhere"),
        ({"json": '{"type": "integer", "minimum": 3, "maximum": 1}'}, "minimum"),
        ({"json": "[]"}, "object"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_a_reason(form, message):
    with pytest.raises(GrammarError, match=message):
        GRAMMARS.matcher(sampling(**form))


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(a|b|ab|ba)*" * 340},
        {"regex": "((a{1000}){1000}){1000}"},
        {"json": '{"type": "array", "minItems": 1000000000}'},
        {"regex": "(" * 200 + "a" + "){0,9}" * 200},
        {"regex": r"(\w|\d|\p{L}){1,500}" * 50},
        {"regex": ".*" * 2048},
        {"choice": tuple(f"{'x' * 50}{i}" for i in range(1000))},
        {"json": '{"items":' * 60 + "{}" + "}" * 60},
        {"json": json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(1500)}})},
        {"json": json.dumps({"anyOf": [{"required": [f"p{i}"]} for i in range(300)]})},
        {"json": json.dumps({"allOf": [{"anyOf": [{"maxLength": i}, {}]} for i in range(1, 40)]})},
    ],
)
def test_large_forms_take_bounded_time(form):
    started = time.process_time()
    try:
        matcher, mask = GRAMMARS.matcher(sampling(**form))
        for _ in range(5):
            matcher.accept(min(allowed(mask)))
            if (mask := matcher.mask()) is None:
                break
    except GrammarError:
        pass
    assert time.process_time() - started < 5


def test_only_the_latest_forms_are_kept(monkeypatch):
    monkeypatch.setattr(grammars, "_CACHE_SIZE", 3)
    few = Grammars(TOKENIZER.to_str(), VOCAB_SIZE, (EOS,))
    compiled = []
    compile_ = few._compile
    monkeypatch.setattr(few, "_compile", lambda form: compiled.append(form) or compile_(form))
    for regex in ("a", "b", "c", "a", "d", "a", "b"):
        few.matcher(sampling(regex=regex))
    assert [form.regex for form in compiled] == ["a", "b", "c", "d", "b"]
