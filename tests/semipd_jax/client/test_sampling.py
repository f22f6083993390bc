import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd_jax.client.sampling import (
    check_sampling,
    fold_seed,
    load_generation_defaults,
    parse_sampling,
)
from semipd_jax.errors import CheckpointError, InvalidRequestError
from semipd_jax.request import SamplingParams, StructuredOutputs

DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "max_tokens": 50}


def complete(given_, defaults=DEFAULTS, prompt_len: int = 10) -> SamplingParams:
    prompt = tuple(range(prompt_len))
    checked = check_sampling(given_, defaults, vocab_size=100)
    return checked.after(prompt, vocab_size=100, max_model_len=40)


def test_what_is_given_comes_before_the_models_defaults_and_those_before_ours():
    params = complete({"temperature": 0.0, "min_p": 0.25})
    assert params == SamplingParams(temperature=0.0, top_p=0.9, min_p=0.25, max_tokens=30)


def test_none_in_a_mapping_means_unset():
    assert complete({"temperature": None, "seed": None}).temperature == 0.6


def test_complete_params_ignore_the_models_defaults():
    assert complete(SamplingParams(top_k=5)) == SamplingParams(top_k=5, max_tokens=30)


def test_max_tokens_is_what_fits_unless_the_client_or_the_model_wants_less():
    assert complete({}, defaults={}).max_tokens == 30
    assert complete({}, defaults={"max_tokens": 7}).max_tokens == 7
    assert complete({"max_tokens": 8}, defaults={"max_tokens": 7}).max_tokens == 8
    with pytest.raises(InvalidRequestError, match="max_tokens is 31; allowed: at most 30") as error:
        complete({"max_tokens": 31})
    assert error.value.field == "max_tokens"


def test_short_forms():
    params = complete({"stop": "end", "logit_bias": {3: 1, 4: -2.5}})
    assert params.stop == ("end",)
    assert params.logit_bias == ((3, 1.0), (4, -2.5))
    assert complete({"stop": ["a", "b"], "stop_token_ids": [7]}).stop == ("a", "b")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "5"),
        ("max_tokens", 0),
        ("temperature", "hot"),
        ("temperature", math.nan),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_k", -1),
        ("seed", 1.5),
        ("seed", 2**64),
        ("stop", [1]),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [100]),
        ("logit_bias", [[1, 2, 3]]),
        ("logit_bias", {100: 1.0}),
        ("logprobs", 21),
        ("min_tokens", 31),
        ("ignore_eos", "yes"),
        ("best_of", 3),
    ],
)
def test_errors_name_the_field(field: str, value: object):
    with pytest.raises(InvalidRequestError, match=field) as error:
        complete({field: value})
    assert error.value.field == field


def test_types_of_complete_params_are_checked_too():
    params = SamplingParams()
    object.__setattr__(params, "top_k", "many")
    with pytest.raises(InvalidRequestError, match="top_k"):
        complete(params)


@given(st.integers(0, 2**64 - 1))
def test_small_seeds_are_kept_and_large_ones_fit(seed: int):
    assert fold_seed(seed) == (seed if seed < 2**32 else fold_seed(seed))
    assert 0 <= fold_seed(seed) < 2**32


def test_both_halves_of_a_seed_count():
    assert len({fold_seed(seed) for seed in (1, 2, 2**32 + 1, 2**33 + 1, 2**63)}) == 5


def write(directory: Path, text: str) -> str:
    (directory / "generation_config.json").write_text(text)
    return str(directory)


def test_generation_config_is_read_by_our_names(tmp_path: Path):
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": None,
        "max_new_tokens": 99,
        "eos_token_id": [1, 2],
        "transformers_version": "5.23.0",
    }
    directory = write(tmp_path, json.dumps(config))
    assert load_generation_defaults(directory) == parse_sampling(
        {"temperature": 0.6, "top_p": 0.9, "max_tokens": 99}
    )


def test_a_model_without_generation_config_has_no_defaults(tmp_path: Path):
    assert load_generation_defaults(str(tmp_path)) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": "hot"}', '{"top_p": 7}'])
def test_a_damaged_generation_config_is_refused(text: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_generation_defaults(write(tmp_path, text))


def test_a_schema_may_be_given_as_it_is_or_as_text():
    as_text = {"structured_outputs": {"json": '{"type":"object"}', "regex": None}}
    as_it_is = {"structured_outputs": {"json": {"type": "object"}}}
    form = StructuredOutputs(json='{"type":"object"}')
    assert complete(as_text).structured_outputs == form
    assert complete(as_it_is).structured_outputs == form
    assert complete(SamplingParams(structured_outputs=form)).structured_outputs == form


@pytest.mark.parametrize(
    ("form", "field"),
    [
        (5, ""),
        ({}, ""),
        ({"grammar": "start: /a/"}, ""),
        ({"regex": "a", "choice": ["b"]}, ""),
        ({"json": 5}, ""),
        ({"json": "{"}, "json"),
        ({"json": "[]"}, "json"),
        ({"json": "[" * 60000}, "json"),
        ({"json": '{"a":' * 70 + "1" + "}" * 70}, "json"),
        ({"json": {"description": "x" * 65536}}, "json"),
        ({"json": {"items": [{"pattern": "x" * 4097}]}}, "json"),
        ({"regex": "x" * 4097}, "regex"),
        ({"regex": "\ud800"}, "regex"),
        ({"choice": ["a", ""]}, "choice"),
        ({"choice": ["a"] * 1025}, "choice"),
    ],
)
def test_forms_are_bounded_before_anything_compiles_them(form, field):
    with pytest.raises(InvalidRequestError, match="structured_outputs") as refused:
        complete({"structured_outputs": form})
    assert refused.value.field == ".".join(filter(None, ("structured_outputs", field)))
