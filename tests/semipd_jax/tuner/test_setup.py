"""Which options make a tuner, and what is said about those that do not."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from semipd_jax.errors import ConfigError, StartupError
from semipd_jax.messages import MemoryLayout
from semipd_jax.options import build_config
from semipd_jax.tuner import profile
from semipd_jax.tuner.latency import FEATURES
from semipd_jax.tuner.policy import FULL, Ladders
from semipd_jax.tuner.profile import Profile, Sizes
from semipd_jax.tuner.setup import check_profile, ladders_of, targets_of, tuner_factory
from semipd_jax.tuner.slo import SloTarget

SLO = {"slo_ttft_ms": 300, "slo_tpot_ms": 50}
LADDER = {"share_ladder": (0.4, 0.7, 1.0)}


SIZES = Sizes(weight_bytes=16_000_000, kv_bytes_per_token=1024)


def save_profile(path: Path, sizes: Sizes | None = SIZES, **rungs: tuple[float, ...]) -> str:
    made = Profile(
        source="measured",
        device="d",
        model="m",
        sizes=sizes,
        rungs=rungs,
        saturation=0.5,
        yielding={"prefill": 0.0, "decode": 0.0},
        coefficients={p: dict.fromkeys(names, 1e-3) for p, names in FEATURES.items()},
    )
    path.write_text(profile.to_json(made))
    return str(path)


@pytest.fixture
def profile_path(tmp_path) -> str:
    return save_profile(tmp_path / "profile.json")


def test_static_is_the_default_without_a_profile_and_needs_nothing():
    config = build_config("m")
    assert config.share_policy == "static"
    assert tuner_factory(config)("static", targets_of(config.tuner), FULL) is None


def test_predictive_is_the_default_with_a_profile(profile_path):
    given = {"tuner_profile": profile_path, **SLO, **LADDER}
    assert build_config("m", **given).share_policy == "predictive"
    assert build_config("m", policy="static", **given).share_policy == "static"
    assert build_config("m", mode="colocated", tuner_profile=profile_path).share_policy == "static"
    with pytest.raises(ConfigError, match=r"slo_tpot_ms is None.*under the policy predictive"):
        build_config("m", tuner_profile=profile_path, **LADDER)


def test_promises_come_from_the_options():
    targets = targets_of(build_config("m", slo_target=0.99, **SLO).tuner)
    assert (targets.default.ttft_ms, targets.default.tpot_ms) == (300.0, 50.0)
    assert targets.attainment == 0.99


def test_single_priorities_may_be_promised_something_else():
    targets = targets_of(build_config("m", slo_classes="5:2000:100,-1::200", **SLO).tuner)
    assert targets.of(5) == SloTarget(2000.0, 100.0)
    assert targets.of(-1) == SloTarget(None, 200.0)
    assert targets.of(0) == SloTarget(300.0, 50.0)
    assert targets.tightest_tpot_s([0, 5]) == 0.05


@pytest.mark.parametrize("policy", ["semi-pd", "semi-pd-replan"])
def test_reactive_policies_need_a_ladder_and_promises(policy):
    config = build_config("m", policy=policy, **SLO, **LADDER)
    assert tuner_factory(config)(policy, targets_of(config.tuner), FULL) is not None


def test_a_ladder_for_one_phase_is_enough():
    shares = build_config("m", decode_share_ladder=(0.2, 0.4)).shares
    assert ladders_of(shares) == Ladders(prefill=(1.0,), decode=(0.2, 0.4, 1.0))


def test_the_predictive_policy_needs_a_profile_too(profile_path):
    config = build_config("m", policy="predictive", tuner_profile=profile_path, **SLO, **LADDER)
    assert tuner_factory(config)("predictive", targets_of(config.tuner), FULL) is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": "best"}, "policy is 'best'; allowed: auto, static, semi-pd, "),
        ({"slo_ttft_ms": 0}, "slo_ttft_ms is 0.0"),
        ({"slo_classes": "5:2000"}, "slo_classes is '5:2000'; allowed: priority:ttft_ms:tpot_ms"),
        ({"slo_classes": "x:1:2"}, "slo_classes is 'x:1:2'"),
        ({"slo_classes": "1:-1:2"}, "slo_classes is '1:-1:2'"),
        ({"slo_target": 1.0}, "slo_target is 1.0"),
        ({"policy": "semi-pd", **SLO}, r"share_ladder is \(\); allowed: two shares or more"),
        (
            {"policy": "semi-pd", **SLO, "share_ladder": (0.5, 0.9), "prefill_share": 0.9}
            | {"decode_share": 0.9},
            r"prefill_share_ladder \(or share_ladder\) is \(0.5, 0.9\); .* the last one 1.0",
        ),
        (
            {"policy": "semi-pd", **SLO, **LADDER, "decode_share": 0.5}
            | {"decode_share_ladder": (0.2,)},
            r"decode_share_ladder \(or share_ladder\) is \(0.2, 0.5\)",
        ),
        ({"policy": "semi-pd", "slo_ttft_ms": 300, **LADDER}, "slo_ttft_ms and slo_tpot_ms is"),
        ({"policy": "predictive", **SLO, **LADDER}, "it needs a tuner_profile"),
        ({"policy": "predictive", "slo_ttft_ms": 300, **LADDER}, "slo_tpot_ms is None"),
        ({"tuner_profile": "/no/such/file"}, "tuner_profile '/no/such/file' cannot be read"),
    ],
)
def test_what_is_missing_is_named_before_anything_starts(options, named):
    with pytest.raises(ConfigError, match=named):
        build_config("m", **options)


def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"p\.json.*no latency profile"):
        build_config("m", tuner_profile=str(path))


def test_what_was_learnt_and_the_profile_outlive_a_change_of_promises(profile_path):
    config = build_config("m", policy="predictive", tuner_profile=profile_path, **SLO, **LADDER)
    make, targets = tuner_factory(config), targets_of(config.tuner)
    first = make("predictive", targets, FULL)
    second = make("predictive", replace(targets, default=SloTarget(300.0, 20.0)), FULL)
    assert first is not None
    assert second is not None
    assert first.policy is not second.policy
    assert first.refined is second.refined is not None


def layout(*, weight_bytes=16_000_000, kv_bytes_per_token=1024) -> MemoryLayout:
    return MemoryLayout(
        dtype="float32",
        vocab_size=256,
        max_model_len=256,
        page_size=16,
        num_pages=33,
        num_rows=9,
        weight_bytes=weight_bytes,
        kv_bytes=33 * 16 * kv_bytes_per_token,
        eos_token_ids=(),
    )


def warnings_of(caplog, path: str, model: str, device: str, **sizes: int) -> list[str]:
    caplog.set_level(logging.WARNING)
    check_profile(build_config(model, policy="static", tuner_profile=path), device, layout(**sizes))
    return [record.getMessage() for record in caplog.records]


def test_a_profile_of_this_model_on_this_device_is_fine(caplog, profile_path):
    assert warnings_of(caplog, profile_path, "m", "d") == []


def test_without_a_profile_there_is_nothing_to_compare(caplog):
    check_profile(build_config("other"), "e", layout())
    assert not caplog.records


def test_a_ladder_below_what_was_measured_is_worth_a_warning(caplog, tmp_path):
    path = save_profile(tmp_path / "p.json", prefill=(0.5, 1.0), decode=(0.5, 1.0))
    caplog.set_level(logging.WARNING)
    for least in (0.5, 0.2):
        ladder = {"prefill_share_ladder": (0.5,), "decode_share_ladder": (least, 1.0)}
        config = build_config("m", policy="static", tuner_profile=path, **ladder)
        check_profile(config, "d", layout())
    [record] = caplog.records
    assert "down to a share of 0.5 for decode; the ladder goes down to 0.2" in record.getMessage()


def test_a_profile_of_another_device_is_worth_a_warning_with_both_names(caplog, profile_path):
    [text] = warnings_of(caplog, profile_path, "m", "an H200")
    assert text == f"{profile_path} is a profile of the device 'd', not of 'an H200'"


@pytest.mark.parametrize(
    "sizes",
    [{"weight_bytes": 17_000_000}, {"weight_bytes": 15_000_000}, {"kv_bytes_per_token": 512}],
)
def test_a_profile_of_a_model_of_another_size_is_refused(caplog, profile_path, sizes):
    named = r"'m' with 15\.3 MiB of weights and 1,024 bytes of KV per token; .* 'other' with"
    with pytest.raises(StartupError, match=named):
        warnings_of(caplog, profile_path, "other", "d", **sizes)


def test_a_name_says_less_than_sizes(caplog, tmp_path):
    """The same model under another name, with a few more words in its vocabulary."""
    path = save_profile(tmp_path / "p.json")
    assert warnings_of(caplog, path, "other", "d", weight_bytes=16_500_000) == []
    path = save_profile(tmp_path / "q.json", sizes=None)
    assert warnings_of(caplog, path, "m", "d") == []
    [text] = warnings_of(caplog, path, "other", "d")
    assert text == f"{path} is a profile of the model 'm', not of 'other'"
