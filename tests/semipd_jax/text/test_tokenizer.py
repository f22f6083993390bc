import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizers import (
    BYTE_LEVEL_IDS,
    byte_level_bpe,
    save,
    save_byte_fallback,
    save_byte_level,
)
from transformers import AutoTokenizer

from semipd_jax.errors import CheckpointError, InvalidRequestError
from semipd_jax.text import tokenizer as tokenizer_module
from semipd_jax.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["", " ", "the theatre", " leading", "Grüße, 日本語 😀", "a<|eos|>b", "x\n\n  y", "é"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße! <|eos|> {{ 1 + 1 }}"},
]


@pytest.mark.parametrize("save_tokenizer", [save_byte_level, save_byte_fallback])
@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_ids_are_those_of_transformers(save_tokenizer, config, tmp_path: Path):
    directory = save_tokenizer(tmp_path, **config)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_chat_ids_are_those_of_transformers(tmp_path: Path):
    directory = save_byte_level(tmp_path)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CHAT) == expected


def test_byte_tokens_are_where_these_tests_expect_them(byte_level: Tokenizer):
    spelled = [BYTE_LEVEL_IDS[byte] for byte in "Grüße 日".encode()]
    assert byte_level.decode(spelled) == "Grüße 日"


def test_decoding_leaves_out_ids_that_stand_for_nothing(byte_level: Tokenizer):
    ids = byte_level.encode("the fox", add_special_tokens=False)
    assert byte_level.decode([*ids, byte_level.size + 7]) == "the fox"


def test_a_template_may_refuse_messages(byte_level: Tokenizer):
    with pytest.raises(InvalidRequestError, match="unknown role wizard") as refused:
        byte_level.encode_chat([{"role": "wizard", "content": "hi"}])
    assert refused.value.field == "chat"


def test_a_model_without_template_refuses_chat(byte_fallback: Tokenizer):
    with pytest.raises(InvalidRequestError, match="no chat template"):
        byte_fallback.encode_chat(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ 'x' * 2 ** 60 }}",
        "{{ messages[0].content.encode('ascii') }}",
        "{{ 1 // 0 }}",
        "{{ [][5][5] }}",
        "{% if",
    ],
)
def test_whatever_a_template_does_wrong_is_an_error_about_the_messages(
    tmp_path: Path, template: str
):
    tokenizer = load_tokenizer(save_byte_level(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequestError, match="the model's chat template") as refused:
        tokenizer.encode_chat([{"role": "user", "content": "Grüße"}])
    assert refused.value.field == "chat"


def test_a_template_stops_when_it_has_written_enough(tmp_path: Path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = load_tokenizer(save_byte_level(tmp_path, chat_template=template))
    chat = [{"role": "user", "content": "a" * 10}] * 10
    assert tokenizer.render_chat(chat, max_chars=100) == "a" * 100
    with pytest.raises(InvalidRequestError, match="more than 99 characters") as refused:
        tokenizer.render_chat(chat, max_chars=99)
    assert refused.value.is_too_long


@pytest.mark.parametrize("body", ["", "{{ 'x' }}", "{% if loop is sequence %}{% endif %}"])
def test_a_template_that_loops_ends_by_itself(
    tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenizer_module, "_TEMPLATE_S", 0.2)
    loops = "".join(f"{{% for {x} in range(300) %}}" for x in "abc")
    template = f"{{% set text %}}{loops}{body}{'{% endfor %}' * 3}{{% endset %}}{{{{ text }}}}"
    tokenizer = load_tokenizer(save_byte_level(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequestError, match="takes longer than"):
        tokenizer.encode_chat(CHAT)


def test_a_template_may_use_names(tmp_path: Path):
    template = "{% for m in messages %}{{ m['name'] }}: {{ m['content'] }}{% endfor %}"
    tokenizer = load_tokenizer(save_byte_level(tmp_path, chat_template=template))
    chat = [{"role": "user", "content": "Hi", "name": "Ada"}]
    assert tokenizer.render_chat(chat) == "Ada: Hi"


def test_a_hostile_template_cannot_leave_its_sandbox(tmp_path: Path):
    marker = tmp_path / "marker"
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    escape += "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    tokenizer = load_tokenizer(save_byte_level(tmp_path / "model", chat_template=escape))
    with pytest.raises(InvalidRequestError, match="refuses"):
        tokenizer.encode_chat(CHAT)
    assert not marker.exists()


def test_code_in_the_directory_is_never_run(tmp_path: Path):
    marker = tmp_path / "marker"
    directory = tmp_path / "model"
    save_byte_level(directory, auto_map={"AutoTokenizer": [None, "trap.Trap"]})
    (directory / "trap.py").write_text(f"open({str(marker)!r}, 'w')\nclass Trap: pass\n")
    assert load_tokenizer(str(directory)).decode([2]) != ""
    assert not marker.exists()


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_padding_and_truncation_of_the_file_do_not_apply(tmp_path: Path):
    directory = save_byte_level(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(settings))
    text = "The quick brown fox jumps over the lazy dog."
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_without_a_token_are_unknown(tmp_path: Path):
    backend = byte_level_bpe()
    size = backend.get_vocab_size()
    path = tmp_path / "tokenizer.json"
    directory = save(backend, tmp_path)
    settings = json.loads(path.read_text())
    settings["added_tokens"].append(
        settings["added_tokens"][0] | {"id": size + 5, "content": "<x>"}
    )
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.size <= size + 6
    assert all(
        tokenizer.decode([i], skip_special_tokens=False) == "" for i in tokenizer.unknown_ids
    )


def test_torch_and_jax_are_not_imported():
    code = (
        "import sys, semipd_jax.text.output; "
        "sys.exit(bool({'torch', 'jax', 'flax'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
