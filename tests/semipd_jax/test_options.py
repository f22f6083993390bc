import pytest

from semipd_jax import options
from semipd_jax.errors import ConfigError


def test_every_option_reaches_its_field():
    config = options.build_config(
        "m", max_num_seqs=7, dtype="bfloat16", decode_share=0.5, seed=3, log_level="info"
    )
    assert config.scheduler.max_num_seqs == 7
    assert (config.model.path, config.model.dtype, config.model.seed) == ("m", "bfloat16", 3)
    assert (config.shares.prefill, config.shares.decode) == (1.0, 0.5)
    assert config.log_level == "info"
    config = options.build_config("m", enable_prefix_caching=False, scheduling_policy="spf")
    assert (config.cache.enable_prefix_caching, config.scheduler.policy) == (False, "spf")


def test_defaults_are_the_configuration_s():
    given = {option.name: options.default(option) for option in options.OPTIONS}
    assert options.build_config("m", **given) == options.build_config("m")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("block_size", 24, "16, 32, 64, 128"),
        ("decode_share", 0.0, "above 0"),
        ("prefill_share", 1.5, "at most 1"),
        ("share_ladder", (0.5, 1.5), "at most 1"),
        ("decode_share_ladder", (0.0,), "above 0"),
        ("share_ladder", tuple(i / 24 for i in range(1, 24)), "at most 48 workers"),
        ("share_ladder", 0.5, "tuple of numbers"),
        ("share_ladder", ("0.5",), "tuple of numbers"),
        ("max_num_seqs", 0, "1 to 4096"),
        ("max_num_seqs", "8", "type int"),
        ("max_num_seqs", True, "type int"),
        ("dtype", "float8", "bfloat16"),
        ("max_model_len", 1, "at least 2"),
        ("step_timeout", 0, "positive"),
        ("seed", -1, "0 to"),
        ("enable_prefix_caching", 1, "type bool"),
        ("scheduling_policy", "sjf", "fcfs, spf"),
        ("max_num_queued_tokens", 0, "at least 1"),
        ("ageing_tokens_per_s", 0.0, "positive"),
        ("block_sise", 16, "block_size"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError, match=allowed) as refusal:
        options.build_config("m", **{name: value})
    shown = (value, *value) if isinstance(value, tuple) else (value, name)
    assert any(repr(v) in str(refusal.value) for v in shown)


def test_words_and_types_come_from_the_configuration():
    by_name = {option.name: option for option in options.OPTIONS}
    assert options.choices(by_name["dtype"]) == ("auto", "float32", "bfloat16", "float16")
    assert options.value_type(by_name["max_model_len"]) is int
    assert options.value_type(by_name["decode_share"]) is float
    assert options.value_type(by_name["tokenizer"]) is str
    assert options.value_type(by_name["enable_prefix_caching"]) is bool
    assert options.parse(by_name["share_ladder"])("0.6,1") == (0.6, 1.0)
    with pytest.raises(ValueError, match="could not convert"):
        options.parse(by_name["share_ladder"])("0.6;1")


@pytest.mark.parametrize("mode", ["colocated", "chunked"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefill_share", 0.5),
        ("decode_share", 0.9),
        ("share_ladder", (0.5, 1.0)),
        ("prefill_share_ladder", (0.5,)),
        ("decode_share_ladder", ()),
    ],
)
def test_shares_are_refused_where_one_worker_has_all_compute(mode, name, value):
    options.build_config("m", mode=mode)
    with pytest.raises(ConfigError, match=rf"^{name} is .*; allowed: unset with mode '{mode}'"):
        options.build_config("m", mode=mode, **{name: value})


def test_mixed_steps_need_a_budget_beyond_the_running_requests():
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 64}
    options.build_config("m", mode="colocated", **limits)
    options.build_config("m", mode="chunked", **limits | {"max_num_batched_tokens": 65})
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens is 64; .* max_num_seqs \(64\)"):
        options.build_config("m", mode="chunked", **limits)


def test_rungs_are_a_phase_s_ladder_and_its_share():
    shares = options.build_config("m", decode_share=0.7, share_ladder=(0.5, 1.0)).shares
    assert (shares.rungs("prefill"), shares.rungs("decode")) == ((0.5, 1.0), (0.5, 0.7, 1.0))
    shares = options.build_config("m", share_ladder=(0.5,), decode_share_ladder=()).shares
    assert (shares.rungs("prefill"), shares.rungs("decode")) == ((0.5, 1.0), (1.0,))
