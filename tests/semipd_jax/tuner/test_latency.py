import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelled_profile import coefficients

from semipd_jax.errors import ConfigError
from semipd_jax.messages import DecodeStep, PrefillStep
from semipd_jax.tuner import profile
from semipd_jax.tuner.latency import (
    FEATURES,
    Conditions,
    LatencyModel,
    Sample,
    effective_share,
)
from semipd_jax.tuner.rls import RecursiveLeastSquares
from semipd_jax.tuner.work import Work, work_of

PREFILL = coefficients(
    "prefill", fixed=5e-3, products=5e-3, weights=5e-3, context=1e-1, reads=1e-3, activations=3e-3,
    tokens=25e-3, pairs=2e-3, contention=4e-3,
)  # fmt: skip
DECODE = coefficients(
    "decode", fixed=1e-3, products=1e-3, weights=6e-3, context=8e-3, batched=2e-3, rows=1e-3,
    weights_contention=1e-3, context_contention=2e-3,
)  # fmt: skip

TRUE = {"prefill": PREFILL, "decode": DECODE}
YIELDING = {"prefill": 0.3, "decode": 0.0}
UNSEEN = (0.3, 0.5, 0.7, 0.9)

shares = st.floats(0.05, 1.0)
seconds = st.floats(0, 0.05)


@st.composite
def works(draw):
    rows = draw(st.integers(1, 300))
    contexts = draw(st.integers(rows, rows * 8000))
    if draw(st.booleans()):
        return Work("decode", rows, rows, contexts, contexts)
    tokens = draw(st.integers(rows, 8192))
    return Work("prefill", rows, tokens, contexts + tokens, tokens * draw(st.integers(1, 8000)))


@st.composite
def models(draw):
    """Arguments, not a model: type checks draw random numbers, which strategies may not."""
    values = {p: np.array([draw(seconds) for _ in names]) for p, names in FEATURES.items()}
    kept = st.floats(0, 1)
    yielding = {phase: draw(kept) for phase in FEATURES}
    sizes = sorted(draw(st.sets(st.integers(1, 4096))))
    return values, draw(st.floats(0.1, 1.0)), yielding, dict.fromkeys(FEATURES, sizes)


def test_a_step_takes_as_long_as_the_size_that_it_is_padded_to():
    padding = {"prefill": (32, 128), "decode": (1, 4)}
    model = LatencyModel(TRUE, 0.3, YIELDING, padding)

    def prefill_s(tokens: int) -> float:
        return model.predict(Work("prefill", 1, tokens, 200, 7), Conditions(1.0))

    def decode_s(rows: int) -> float:
        return model.predict(Work("decode", rows, rows, 200, 200), Conditions(1.0))

    assert prefill_s(31) == prefill_s(32) < prefill_s(33) == prefill_s(128) < prefill_s(129)
    assert decode_s(1) < decode_s(2) == decode_s(4) < decode_s(5)


@settings(max_examples=60)
@given(models(), works(), shares, shares, st.one_of(st.just(0.0), shares), st.floats(0, 1))
def test_more_share_never_predicts_slower(args, work, a, b, other, overlap):
    model = LatencyModel(*args)
    less, more = sorted((a, b))
    slow = model.predict(work, Conditions(less, other, overlap))
    fast = model.predict(work, Conditions(more, other, overlap))
    assert fast <= slow * (1 + 1e-9)


@settings(max_examples=60)
@given(models(), works(), shares, shares, shares)
def test_a_busier_neighbour_never_predicts_faster(args, work, own, a, b):
    model = LatencyModel(*args)
    less, more = sorted((a, b))
    times = [model.predict(work, Conditions(own, other, 1.0)) for other in (less, more)]
    alone = model.predict(work, Conditions(own))
    assert alone <= times[0] * (1 + 1e-9)
    assert times[0] <= times[1] * (1 + 1e-9)


@settings(max_examples=60)
@given(models(), works(), shares, shares, st.floats(0, 1))
def test_features_times_coefficients_is_the_prediction(args, work, own, other, overlap):
    model = LatencyModel(*args)
    conditions = Conditions(own, other, overlap)
    product = float(model.features(work, conditions) @ model.get(work.phase))
    assert product == pytest.approx(model.predict(work, conditions))


def test_shares_that_do_not_fit_are_normalised():
    assert effective_share(0.6, 0.4) == 0.6
    assert effective_share(1.0, 1.0) == 0.5
    assert effective_share(0.8, 1.0) == pytest.approx(0.8 / 1.8)
    assert effective_share(0.8, 0.0) == 0.8
    assert effective_share(1.0, 1.0, 0.4) == pytest.approx(0.7)
    assert effective_share(1.0, 1.0, 1.0) == 1.0


def test_work_of_steps():
    ints = lambda *values: np.array(values, np.int32).tobytes()  # noqa: E731
    decode = DecodeStep(1, ints(5, 9), ints(1, 2), 1, ints(1, 2), b"")
    assert work_of(decode) == Work("decode", 2, 2, 14, 14)
    prefill = PrefillStep(
        step_id=2,
        token_ids=ints(*range(7)),
        cu_q_lens=ints(0, 3, 7),
        context_lens=ints(3, 10),
        rows=ints(1, 2),
        samples=b"",
        table_width=1,
        page_table=ints(1, 2),
        sampling=b"",
    )
    # 1 + 2 + 3 pairs, then 7 + 8 + 9 + 10.
    assert work_of(prefill) == Work("prefill", 2, 7, 13, 40)


def samples(rng, model, num, *, noise=0.02, outliers=0.0):
    made = []
    for _ in range(num):
        rows = 1 if rng.random() < 0.2 else int(rng.integers(2, 256))
        contexts = rows * int(rng.integers(50, 4000))
        work = Work("decode", rows, rows, contexts, contexts)
        if rng.random() < 0.5:
            tokens = int(rng.integers(16, 4096))
            earlier = int(rng.integers(0, 8000))
            pairs = tokens * earlier + tokens * (tokens + 1) // 2
            work = Work("prefill", 1, tokens, earlier + tokens, pairs)
        own, other = rng.choice([0.2, 0.4, 0.6, 0.8, 1.0], 2)
        conditions = Conditions(float(own), float(other), float(rng.integers(0, 2)))
        factor = float(np.exp(noise * rng.standard_normal()))
        if rng.random() < outliers:
            factor *= float(rng.uniform(3, 20))
        made.append(Sample(work, conditions, factor * model.predict(work, conditions)))
    return made


def slowed(model):
    twice = {phase: 2 * model.get(phase) for phase in FEATURES}
    return LatencyModel(twice, model.saturation, model.yielding)


def true_model():
    return LatencyModel(TRUE, 1 / 3, YIELDING)


@pytest.mark.parametrize("seed", range(5))
def test_recursive_least_squares_recovers_coefficients_despite_outliers(seed):
    rng, model = np.random.default_rng(seed), true_model()
    prior = DECODE * rng.uniform(0.5, 1.6, DECODE.size)
    fit = RecursiveLeastSquares(prior, 0.5 * DECODE)
    for s in samples(rng, model, 6000, noise=0.005, outliers=0.05):
        if s.work.phase == "decode":
            fit.update(model.features(s.work, s.conditions), s.seconds)
    np.testing.assert_allclose(fit.coefficients, DECODE, rtol=0.1)


def test_coefficients_never_become_negative():
    rng = np.random.default_rng(0)
    fit = RecursiveLeastSquares(np.full(2, 1e-3), np.full(2, 1e-2))
    for _ in range(200):
        x = rng.uniform(1, 2)
        fit.update(np.array([1.0, x]), 3e-3 - 1e-3 * x)
        assert (fit.coefficients >= 0).all()


def test_recursive_least_squares_follows_a_machine_that_slows_down():
    rng = np.random.default_rng(1)
    model = true_model()
    slow = slowed(model)
    fit = RecursiveLeastSquares(DECODE, 0.3 * DECODE)
    for s in samples(rng, slow, 8000):
        if s.work.phase == "decode":
            fit.update(model.features(s.work, s.conditions), s.seconds)
    model.set("decode", fit.coefficients)
    assert profile.mean_error(model, samples(rng, slow, 500))["decode"] < 0.05


def test_hours_without_a_kind_of_step_do_not_wear_out_what_the_prior_says_of_it():
    """No step shows the second coefficient, until a bad sample does: 30 % off, and just one."""
    prior = np.array([1e-3, 1e-3])
    fit = RecursiveLeastSquares(prior, 0.3 * prior)
    for _ in range(10_000):
        fit.update(np.array([1.0, 0.0]), 1e-3)
    fit.update(np.array([1.0, 1.0]), 1.3 * 2e-3)
    np.testing.assert_allclose(fit.coefficients, prior, rtol=0.2)


def test_fit_recovers_a_model_and_a_file_keeps_it():
    """In little noise: in more, constants are hard to tell apart, though their sum is not."""
    rng, model = np.random.default_rng(2), true_model()
    fitted = profile.fit(samples(rng, model, 2000, noise=1e-3), saturation=1 / 3)
    np.testing.assert_allclose(fitted.get("prefill"), PREFILL, rtol=0.1)
    np.testing.assert_allclose(fitted.get("decode"), DECODE, rtol=0.1)
    assert fitted.yielding == YIELDING
    kept = profile.Profile(
        source="measured",
        device="d",
        model="m",
        saturation=1 / 3,
        yielding=fitted.yielding,
        coefficients=profile.named(fitted),
    )
    again = profile.from_json(profile.to_json(kept))
    assert again == kept
    np.testing.assert_array_equal(profile.model_of(again).get("decode"), fitted.get("decode"))


@pytest.mark.parametrize("seed", range(3))
def test_fit_predicts_shares_that_were_not_measured(seed):
    rng, model = np.random.default_rng(seed), true_model()
    fitted = profile.fit(samples(rng, model, 400), saturation=1 / 3)
    others = [replace(s, conditions=Conditions(x)) for s in samples(rng, model, 50) for x in UNSEEN]
    wanted = [replace(s, seconds=model.predict(s.work, s.conditions)) for s in others]
    assert max(profile.mean_error(fitted, wanted).values()) < 0.02


def test_what_a_single_share_cannot_tell_apart_is_weights_or_arithmetic():
    rng, model = np.random.default_rng(4), true_model()
    made = samples(rng, model, 2000, noise=1e-3)
    at_full = [s for s in made if s.conditions.share == 1 and not s.conditions.overlap]
    fitted = profile.fit(at_full, saturation=1 / 3)
    assert max(profile.mean_error(fitted, at_full).values()) < 0.01
    for phase, values in profile.named(fitted).items():
        truth = dict(zip(FEATURES[phase], TRUE[phase].tolist(), strict=True))
        constants = sum(truth[name] for name in ("fixed", "products", "weights"))
        assert values["fixed"] == values["products"] == 0
        assert values["weights"] == pytest.approx(constants, rel=0.1)
    values = profile.named(fitted)["prefill"]
    assert values["reads"] == values["activations"] == 0
    assert values["tokens"] == pytest.approx(25e-3 + 3e-3, rel=0.1)
    assert values["pairs"] == pytest.approx(2e-3 + 1e-3, rel=0.1)


def test_fit_leaves_out_what_would_be_negative():
    rng, model = np.random.default_rng(3), true_model()
    no_contention = PREFILL.copy()
    no_contention[-1] = 0
    model.set("prefill", no_contention)
    fitted = profile.fit(samples(rng, model, 400, noise=0.1), saturation=1 / 3)
    assert (fitted.get("prefill") >= 0).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": "semipd.latency/1"}, "schema is 'semipd.latency/1'"),
        ({"saturation": 0.0}, "saturation is 0.0"),
        ({"yielding": {"prefill": 1.5, "decode": 0}}, r"yielding.prefill is 1\.5"),
        ({"source": "guessed"}, "guessed"),
        ({"coefficients": {"prefill": {}}}, "coefficients.prefill"),
    ],
)
def test_bad_profiles_are_refused_by_name(change, named):
    good = profile.Profile(
        source="modelled",
        device="d",
        model="m",
        saturation=0.5,
        yielding=YIELDING,
        coefficients=profile.named(true_model()),
    )
    broken = json.loads(profile.to_json(good)) | change
    with pytest.raises(ConfigError, match=named):
        profile.from_json(json.dumps(broken))


def test_negative_coefficient_is_refused():
    values = profile.named(true_model())
    values["decode"]["rows"] = -1.0
    bad = profile.Profile(
        source="modelled",
        device="d",
        model="m",
        saturation=0.5,
        yielding=YIELDING,
        coefficients=values,
    )
    with pytest.raises(ConfigError, match=r"decode\.rows is -1\.0"):
        profile.from_json(profile.to_json(bad))
