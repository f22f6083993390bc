import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from semipd_jax.demo import MODEL_DIR
from semipd_jax.demo.tokenizer import END_OF_TEXT, train_tokenizer

SHIPPED = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example(END_OF_TEXT)
def test_any_text_survives(text):
    ids = SHIPPED.encode(text, add_special_tokens=False).ids
    assert SHIPPED.decode(ids, skip_special_tokens=False) == text


@given(st.text("ab_ .\t\r\n(0é"), st.text("ab_ .\t\r(0é"))
def test_a_prompt_may_stop_at_a_line_end(before, after):
    def ids(text):
        return SHIPPED.encode(text, add_special_tokens=False).ids

    assert ids(f"{before}\n") + ids(after) == ids(f"{before}\n{after}")


def test_an_indentation_is_one_token():
    assert SHIPPED.encode("\n        return 42").tokens == [
        END_OF_TEXT,
        "Ċ",
        "Ġ" * 8,
        "return",
        "Ġ4",
        "2",
    ]


def test_training_is_deterministic_and_fills_the_vocabulary():
    texts = ["def f(x):\n    return x + 1\n", "class A:\n    pass\n"] * 2
    one, two = train_tokenizer(texts, 270), train_tokenizer(iter(texts), 270)
    assert one.to_str() == two.to_str()
    assert one.get_vocab_size() == 270
    assert one.token_to_id(END_OF_TEXT) == 0


def test_transformers_reads_the_same_ids_and_special_tokens(tokenizer):
    text = "def f(path):\n    with open(path) as file:\n"
    assert tokenizer(text).input_ids == SHIPPED.encode(text).ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert len(tokenizer) == 4096


def test_a_chat_becomes_commented_source(tokenizer):
    messages = [
        {"role": "system", "content": "Answer in Python."},
        {"role": "user", "content": "Add two numbers.\nTwice."},
        {"role": "assistant", "content": "print(1 + 1)"},
        {"role": "user", "content": "Again."},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        f"{END_OF_TEXT}# Answer in Python.\n# Add two numbers.\n# Twice.\nprint(1 + 1)\n# Again.\n"
    )
