import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import save_byte_level

from semipd_jax.client.prompt import MAX_BYTES_PER_TOKEN, MAX_CHAT_MESSAGES, PromptEncoder
from semipd_jax.errors import InvalidRequestError
from semipd_jax.text.tokenizer import Tokenizer, load_tokenizer

LENGTH = 1000


def encode(tokenizer: Tokenizer, prompt, **options) -> tuple[int, ...]:
    encoder = PromptEncoder(tokenizer, LENGTH)
    try:
        return asyncio.run(encoder.encode(prompt, **options))
    finally:
        encoder.close()


def test_text_ids_and_chat(tokenizer: Tokenizer):
    text, chat = "Grüße 😀", [{"role": "user", "content": "Hi"}]
    assert encode(tokenizer, text) == tuple(tokenizer.encode(text))
    assert encode(tokenizer, text, add_special_tokens=False) == tuple(
        tokenizer.encode(text, add_special_tokens=False)
    )
    assert encode(tokenizer, chat) == tuple(tokenizer.encode_chat(chat))
    assert encode(tokenizer, [5, 6]) == (5, 6)
    assert encode(tokenizer, np.array([5, 6])) == (5, 6)
    assert encode(tokenizer, []) == ()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * (MAX_BYTES_PER_TOKEN * LENGTH + 1), "allowed: at most 16000"),
        ("😀" * (MAX_BYTES_PER_TOKEN * LENGTH // 4 + 1), "allowed: at most 16000"),
        ("\ud800", "not Unicode"),
        (None, "NoneType; allowed: text"),
        ([1, 2.5], "no token id"),
        ([1, "a"], "no token id"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": None}], "message 1"),
        ([{"role": "user", "content": "a", "tool": "b"}], "message 0"),
        ([{"role": "user", "content": "a", "name": 5}], "message 0"),
        ([{"role": "user", "content": "a"}, "b"], "message 1"),
        ([{"role": "user", "content": "a"}] * (MAX_CHAT_MESSAGES + 1), "4097 messages"),
        ([{"role": "user", "content": "x" * 9000}] * 2, "allowed: at most 16000"),
    ],
)
def test_bad_prompts_are_refused(tokenizer: Tokenizer, prompt, message: str):
    with pytest.raises(InvalidRequestError, match=message) as error:
        encode(tokenizer, prompt)
    assert error.value.field in ("prompt", "chat")


@pytest.mark.parametrize("prompt", ["x" * 9000, [{"role": "user", "content": "Hi"}]])
def test_long_texts_and_templates_do_not_run_on_the_event_loop(
    tokenizer: Tokenizer, prompt, monkeypatch: pytest.MonkeyPatch
):
    threads: list[threading.Thread] = []
    for name in ("encode", "render_chat"):
        original = getattr(Tokenizer, name)

        def spy(*args, original=original, **kwargs):
            threads.append(threading.current_thread())
            return original(*args, **kwargs)

        monkeypatch.setattr(Tokenizer, name, spy)
    encode(tokenizer, prompt)
    assert threads
    assert threading.main_thread() not in threads


def test_a_slow_template_keeps_no_text_waiting(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    begun, is_over = threading.Event(), threading.Event()

    def render(*_: object, **__: object) -> str:
        begun.set()
        assert is_over.wait(60)
        return ""

    monkeypatch.setattr(Tokenizer, "render_chat", render)

    async def main():
        encoder = PromptEncoder(tokenizer, LENGTH)
        chat = [{"role": "user", "content": "Hi"}]
        chats = [asyncio.ensure_future(encoder.encode(chat)) for _ in range(4)]
        try:
            assert await asyncio.to_thread(begun.wait, 60)
            async with asyncio.timeout(30):
                assert await encoder.encode("x" * 9000)
            assert not any(chat.done() for chat in chats)
        finally:
            is_over.set()
            await asyncio.gather(*chats)
            encoder.close()

    asyncio.run(main())


def test_what_a_template_writes_has_a_bound(tmp_path: Path):
    """Of as many characters as a prompt may have bytes."""
    template = "{{ messages[0]['content'] }}{% for _ in range(99999) %}{{ ' ' }}{% endfor %}"
    tokenizer = load_tokenizer(save_byte_level(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequestError, match="more than 16000 characters") as error:
        encode(tokenizer, [{"role": "user", "content": "Hi"}])
    assert error.value.is_too_long


@pytest.mark.parametrize("size", [3, 3000])
def test_decoding(tokenizer: Tokenizer, size: int):
    encoder = PromptEncoder(tokenizer, 3000)
    ids = tokenizer.encode("ab" * size)[:size]
    assert asyncio.run(encoder.decode(ids)) == tokenizer.decode(ids)
    shown = asyncio.run(encoder.decode(ids, skip_special_tokens=False))
    assert shown == "<|bos|>" + tokenizer.decode(ids)
    with pytest.raises(InvalidRequestError, match="model length of 3000"):
        asyncio.run(encoder.decode([5] * 3001))
    encoder.close()
