import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from semipd_jax.demo import checkpoint
from semipd_jax.demo.corpus import Document
from semipd_jax.demo.tokenizer import train_tokenizer
from semipd_jax.demo.train import (
    MODEL,
    Recipe,
    clock,
    learning_rate,
    loss_function,
    main,
    train,
)
from semipd_jax.demo.windows import make_windows
from semipd_jax.models.registry import parse_spec

TINY = MODEL | {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "head_dim": 8,
}
SPEC = parse_spec(TINY)
LENGTH = 16
DOCUMENTS = [
    Document("a.py", "def add(x, y):\n    return x + y\n\n\n" * 12),
    Document("b.py", "class A:\n    def get(self):\n        return self._value\n" * 12),
]


@pytest.fixture(autouse=True)
def promotion():
    """optax multiplies a float by its integer step count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((document.text for document in DOCUMENTS), TINY["vocab_size"])


@pytest.fixture(scope="module")
def windows(tokenizer):
    return make_windows(tokenizer, DOCUMENTS)


def two_steps(windows, seed):
    recipe = Recipe(
        step_tokens=32,
        window=LENGTH,
        short_until=0.0,
        peak_learning_rate=1e-2,
        report_every=1,
        seed=seed,
    )
    held_out = windows.at(windows.tiles(LENGTH)[:8], LENGTH)
    return list(train(SPEC, recipe, windows, held_out, [0.1, 0.3]))


@pytest.fixture(scope="module")
def reports(windows):
    with jax.numpy_dtype_promotion("standard"):
        return two_steps(windows, seed=0)


def test_a_window_is_end_of_text_then_the_start_of_a_line(windows, tokenizer):
    (batch,) = itertools.islice(windows.shuffled(8, LENGTH, seed=1), 1)
    assert batch.shape == (8, LENGTH + 1)
    starts = {line.lstrip("\n") for document in DOCUMENTS for line in document.text.split("\n")}
    for window in batch.tolist():
        first_line = tokenizer.decode(window[1:]).split("\n")[0]
        assert window[0] == 0
        assert any(start.startswith(first_line) for start in starts)


def test_two_steps_reduce_the_loss(reports):
    first, second = reports
    assert abs(first.train_loss - math.log(TINY["vocab_size"])) < 0.1
    assert second.held_out_loss < first.held_out_loss < math.log(TINY["vocab_size"])
    assert (second.step, second.num_tokens) == (2, 2 * 32)


def test_the_seed_decides_the_weights(reports, windows):
    one, same, other = (
        run[-1].params for run in (reports, two_steps(windows, seed=0), two_steps(windows, seed=1))
    )
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one["embed_tokens"], other["embed_tokens"])


def test_the_loss_is_that_of_transformers_on_the_written_checkpoint(
    tmp_path, reports, windows, tokenizer
):
    params = reports[-1].params
    checkpoint.write_metadata(tmp_path, TINY, tokenizer)
    checkpoint.write_weights(tmp_path, SPEC, params)
    tokens = windows.at(windows.tiles(LENGTH)[:3], LENGTH)

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor(tokens, dtype=torch.int64)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    loss = jax.jit(loss_function(SPEC))(rounded, tokens)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_the_learning_rate_warms_up_then_anneals_to_zero():
    recipe = Recipe(peak_learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(recipe, progress / 100) for progress in range(101)]
    assert rates[0] == 0.0
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_clock_ends_with_the_whole_budget():
    *before, last = clock(minutes=1e-4)
    assert last == 1.0
    assert all(progress < 1.0 for progress in before)


@pytest.mark.parametrize("minutes", ["0", "-1"])
def test_a_budget_of_no_time_is_refused(tmp_path, capsys, minutes):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), f"--minutes={minutes}"])
    assert f"--minutes is {minutes}; allowed: above 0" in capsys.readouterr().err
