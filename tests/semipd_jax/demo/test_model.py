import ast
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semipd_jax.demo import MODEL_DIR
from semipd_jax.models.registry import load_spec

torch.set_num_threads(1)  # a model so small that threads would only wait for each other

UNSEEN = '''\
def count_words(path, encoding="utf-8"):
    """Return a dictionary that maps each word of a file to its number of occurrences."""
    counts = {}
    with open(path, encoding=encoding) as file:
        for line in file:
            for word in line.split():
                counts[word] = counts.get(word, 0) + 1
    return counts
'''
PROMPTS = [
    "def read_file(path):\n    with open(",
    "import os\nimport sys\n\n",
    "class Stack:\n    def __init__(self",
    "for i in range(",
]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def complete(model, tokenizer, prompt, num_tokens):
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return ids[0]


def test_the_directory_is_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert sizes.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) < 8_000_000


def test_the_engine_and_transformers_agree_on_what_it_is(model):
    spec = load_spec(MODEL_DIR)
    assert spec.checkpoint_dtype == "bfloat16"
    assert sum(math.prod(weight.shape) for weight in spec.weights) == model.num_parameters()
    assert spec.config.rope.theta == model.config.rope_parameters["rope_theta"]


def test_it_knows_python(model, tokenizer):
    """Token frequencies alone give 6.4 nats per token here, a uniform guess 8.3."""
    ids = tokenizer(UNSEEN, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss < 3.5


def test_it_completes_a_function_that_parses(model, tokenizer):
    text = tokenizer.decode(complete(model, tokenizer, PROMPTS[0], 48), skip_special_tokens=True)
    assert text.startswith(PROMPTS[0])
    (function,) = ast.parse(text.split("\n\n")[0]).body
    assert isinstance(function, ast.FunctionDef)
    assert isinstance(function.body[0], ast.With)


def test_its_choices_are_clear(model, tokenizer):
    """Two implementations whose logits differ by rounding must choose the same tokens."""
    margins = []
    for prompt in PROMPTS:
        ids = complete(model, tokenizer, prompt, 32)
        with torch.no_grad():
            best, second = model(ids[None]).logits[0].topk(2).values.unbind(-1)
        margins.append(best - second)
    margin = torch.cat(margins)
    assert float(margin.median()) > 0.5
    assert float(margin.min()) > 1e-3
