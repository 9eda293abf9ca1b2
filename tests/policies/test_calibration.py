"""Calibrators: the maps, when they apply, and what their file may say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policies.calibration import (
    Beta,
    CalibrationError,
    Calibrator,
    Isotonic,
    LogisticScore,
    Platt,
    artefact_schema,
    certificate_for,
    is_calibrator,
    load_calibrator,
    logistic,
)
from policies.model import RiskTier
from policies.signals import score
from tests.policies.build import opines, policy, says, stage
from validators import Check, OnError, OnFail

DEMO = Path(__file__).parents[2] / "config" / "calibrators" / "demo.json"
PROBABILITY = st.floats(min_value=0, max_value=1)
SIGNALS = {"mean_logprob": -0.2, "n_tokens": 12.0}
ARTEFACT: dict[str, Any] = {
    "format": 1,
    "name": "refunds",
    "created_at": "2026-01-02T03:04:05Z",
    "source": "logprob",
    "model": "gpt-4o*",
    "score": {"kind": "signal", "name": "mean_logprob"},
    "n": 500,
    "calibrator": {"kind": "platt", "a": -1.0, "b": 0.0},
}

platts = st.builds(
    Platt,
    kind=st.just("platt"),
    a=st.floats(min_value=-1e6, max_value=0),
    b=st.floats(min_value=-1e6, max_value=1e6),
)


betas = st.builds(
    Beta,
    kind=st.just("beta"),
    a=st.floats(min_value=0, max_value=1e6),
    b=st.floats(min_value=0, max_value=1e6),
    c=st.floats(min_value=-1e6, max_value=1e6),
)


@st.composite
def isotonics(draw: st.DrawFn) -> Isotonic:
    x = sorted(draw(st.sets(PROBABILITY, min_size=2, max_size=20)))
    y = sorted(draw(st.lists(PROBABILITY, min_size=len(x), max_size=len(x))))
    return Isotonic(kind="isotonic", x=tuple(x), y=tuple(y))


def load(**changes: Any) -> Calibrator:
    return load_calibrator(json.dumps(ARTEFACT | changes), file="refunds.json")


@given(st.floats(allow_nan=False))
def test_logistic_is_a_probability_for_any_number(z: float) -> None:
    assert 0 <= logistic(z) <= 1
    assert logistic(z) + logistic(-z) == pytest.approx(1)


@given(st.one_of(platts, betas, isotonics()), PROBABILITY, PROBABILITY)
def test_maps_stay_in_range_and_never_fall(
    fitted: Platt | Beta | Isotonic, left: float, right: float
) -> None:
    low, high = sorted((left, right))
    assert 0 <= fitted.apply(low) <= fitted.apply(high) <= 1


@given(st.floats(min_value=1e-4, max_value=1 - 1e-4))
def test_platt_that_found_nothing_to_correct_is_the_identity(value: float) -> None:
    assert Platt(kind="platt", a=-1.0, b=0.0).apply(value) == pytest.approx(value)


@given(PROBABILITY, st.floats(min_value=0, max_value=10), st.floats(min_value=-5, max_value=5))
def test_beta_with_both_ends_alike_is_platt(value: float, slope: float, offset: float) -> None:
    beta = Beta(kind="beta", a=slope, b=slope, c=offset)
    platt = Platt(kind="platt", a=-slope, b=-offset)
    assert beta.apply(value) == pytest.approx(platt.apply(value))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, 0.1), (0.2, 0.1), (0.4, 0.3), (0.6, 0.5), (0.8, 0.5), (1.0, 0.5)],
)
def test_isotonic_is_linear_between_its_points_and_constant_outside(
    value: float, expected: float
) -> None:
    fitted = Isotonic(kind="isotonic", x=(0.2, 0.6, 0.8), y=(0.1, 0.5, 0.5))
    assert fitted.apply(value) == pytest.approx(expected)


def test_confidence_is_the_mapped_score() -> None:
    assert load().confidence(SIGNALS) == pytest.approx(math.exp(-0.2))


def test_logistic_score_combines_features() -> None:
    calibrator = load(
        score={"kind": "logistic", "intercept": 0.5, "coefficients": {"n_tokens": -0.25}}
    )
    expected = 1 / (1 + math.exp(-(0.5 - 0.25 * math.log(12))))
    assert calibrator.confidence(SIGNALS) == pytest.approx(expected)
    assert calibrator.lacks(SIGNALS) is None
    assert calibrator.lacks({"mean_logprob": -0.2}) == "n_tokens"


@given(PROBABILITY, PROBABILITY, st.floats(min_value=-50, max_value=0))
def test_confidence_never_rises_when_a_check_score_falls(
    left: float, right: float, mean: float
) -> None:
    low, high = sorted((left, right))
    values, calibrator = {"mean_logprob": mean}, load()
    alone = calibrator.confidence(values)
    assert 0 <= calibrator.confidence(values, [low]) <= calibrator.confidence(values, [high])
    assert calibrator.confidence(values, [high]) <= alone <= 1


@pytest.mark.parametrize(
    "fitted",
    [
        {"kind": "platt", "a": -1.0, "b": 0.0},
        {"kind": "isotonic", "x": [0.0, 1.0], "y": [0.5, 1.0]},
    ],
    ids=["platt", "isotonic"],
)
@pytest.mark.parametrize(
    ("mean", "checks"), [(math.nan, []), (-0.1, [math.nan]), (-0.1, [0.5, math.nan])]
)
def test_nan_is_never_confident(fitted: dict[str, Any], mean: float, checks: list[float]) -> None:
    assert load(calibrator=fitted).confidence({"mean_logprob": mean}, checks) == 0.0


def test_a_calibrator_fits_what_it_was_made_for() -> None:
    assert load().fits("gpt-4o-2024-08-06") is None
    assert load().lacks(SIGNALS) is None


@pytest.mark.parametrize(
    ("model", "digest", "says_why"),
    [
        ("gpt-5", None, "is for model gpt-4o*, this is gpt-5"),
        ("", None, "this is unnamed"),
        ("gpt-4o", "a" * 64, "stale"),
    ],
    ids=["model", "no model", "checks"],
)
def test_a_calibrator_says_why_it_does_not_fit(
    model: str, digest: str | None, says_why: str
) -> None:
    reason = load().fits(model, digest)
    assert reason is not None
    assert says_why in reason


JUDGED = {
    "source": "judge",
    "score": {"kind": "signal", "name": "judge.grounded"},
    "judges": {"grounded": "a" * 64},
}


@pytest.mark.parametrize(
    ("judges", "says_why"),
    [
        ({"grounded": "a" * 64, "other": "b" * 64}, None),
        ({"grounded": "b" * 64}, "is stale: the model, rubric or asking of judge grounded"),
        ({"other": "a" * 64}, "needs the judge grounded, which the policy has not"),
    ],
    ids=["same", "changed", "gone"],
)
def test_a_calibrator_of_a_judge_is_for_that_very_judge(
    judges: dict[str, str], says_why: str | None
) -> None:
    reason = load(**JUDGED).fits("gpt-4o", None, judges)
    assert reason == says_why if says_why is None else says_why in (reason or "")


def test_the_score_of_a_judge_is_taken_as_it_is_and_its_feature_is_its_log_odds() -> None:
    values = {"judge.grounded": 0.8}
    assert load(**JUDGED).confidence(values) == pytest.approx(0.8)
    weights = {"kind": "logistic", "intercept": 0.0, "coefficients": {"judge.grounded": 0.5}}
    assert load(**JUDGED | {"score": weights}).confidence(values) == pytest.approx(2 / 3)


def test_a_judge_that_feeds_the_score_is_known_by_its_digest() -> None:
    fed = opines("q", on_fail=OnFail.SCORE)
    same = opines("q", on_fail=OnFail.SCORE, on_error=OnError.HOLD)
    other = opines("q", on_fail=OnFail.SCORE, model="judge-large")
    assert digest(fed) == digest(same)
    assert digest(fed) != digest(other)


def test_a_calibrator_made_with_checks_is_stale_without_them() -> None:
    assert "stale" in (load(checks_digest="a" * 64).fits("gpt-4o", None) or "")


@pytest.mark.parametrize("values", [{"n_tokens": 3.0}, {"mean_logprob": math.nan}])
def test_a_signal_that_is_missing_or_no_number_is_named(values: dict[str, float]) -> None:
    assert load().lacks(values) == "mean_logprob"


def digest(*checks: Check) -> str | None:
    return policy(stage(*checks)).checks_digest


def test_checks_digest_knows_the_checks_that_feed_the_score_and_no_others() -> None:
    one, two = says("one", on_fail=OnFail.SCORE), says("two", on_fail=OnFail.SCORE)
    changed = says("two", on_fail=OnFail.SCORE, score=0.5)
    assert digest(says("other")) is None
    assert digest(one, two) == digest(two, says("other"), one)
    assert digest(one, two) != digest(one, changed)


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        ({"format": 2}, "format", "1"),
        ({"colour": "red"}, "colour", "not permitted"),
        ({"created_at": "2026-01-02T03:04:05"}, "created_at", "timezone"),
        ({"n": "500"}, "n", "integer"),
        ({"calibrator": {"kind": "platt", "a": 0.5, "b": 0}}, "platt.a", "less than or equal to 0"),
        ({"calibrator": {"kind": "platt", "a": math.nan, "b": 0}}, "platt.a", ""),
        ({"calibrator": {"kind": "platt", "a": -1, "b": math.inf}}, "platt.b", ""),
        ({"calibrator": {"kind": "spline"}}, "calibrator", "'platt', 'beta', 'isotonic'"),
        (
            {"calibrator": {"kind": "isotonic", "x": [0.1, 0.1], "y": [0.1, 0.2]}},
            "isotonic",
            "x must increase",
        ),
        (
            {"calibrator": {"kind": "isotonic", "x": [0.1, 0.2], "y": [0.2, 0.1]}},
            "isotonic",
            "y must not decrease",
        ),
        (
            {"calibrator": {"kind": "isotonic", "x": [0.1, 0.2], "y": [0.1, 0.2, 0.3]}},
            "isotonic",
            "x has 2 values and y has 3",
        ),
        ({"score": {"kind": "signal", "name": "mean_margin"}}, "signal.name", "mean_logprob"),
        (
            {"score": {"kind": "logistic", "intercept": 0, "coefficients": {"mood": 1}}},
            "coefficients.mood",
            "n_tokens",
        ),
        ({"checks_digest": "abc"}, "checks_digest", "pattern"),
        ({"judges": {"grounded": "a" * 64}}, "the document", "of no other; it has grounded"),
        (
            {"score": {"kind": "signal", "name": "judge.grounded"}},
            "the document",
            "the score needs, grounded, and of no other; it has none",
        ),
        ({"score": {"kind": "signal", "name": "judge.Grounded"}}, "signal.name", "judge"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_key(
    changes: dict[str, Any], place: str, message: str
) -> None:
    with pytest.raises(CalibrationError) as caught:
        load(**changes)
    assert str(caught.value).startswith("refunds.json: ")
    assert place in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"' + "x" * 1_000_001 + '"'], ids=["empty", "cut", "list", "huge"]
)
def test_a_file_that_is_no_artefact_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError, match=r"^refunds\.json: "):
        load_calibrator(text, file="refunds.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(ARTEFACT), True),
        ("", True),
        ("[]", True),
        ('{"format": 1, "name": "t", "target_agreement": 0.85, "judges": []}', False),
    ],
)
def test_thresholds_of_judges_may_lie_beside_calibrators(text: str, expected: bool) -> None:
    assert is_calibrator(text) is expected


def test_the_schema_accepts_the_demo_artefact_and_refuses_an_unknown_key() -> None:
    validator = jsonschema.Draft202012Validator(artefact_schema())
    artefact = json.loads(DEMO.read_text())
    assert validator.is_valid(artefact)
    assert not validator.is_valid(artefact | {"colour": "red"})


def test_the_demo_artefact_is_for_the_demo_model_only_and_helps() -> None:
    demo = load_calibrator(DEMO.read_text(), file="demo.json")
    assert demo.fits("demo-orders") is None
    assert demo.fits("gpt-4o") is not None
    assert "demo model only" in demo.description
    assert demo.metrics is not None
    assert demo.metrics.ece < demo.metrics.ece_raw
    assert demo.metrics.brier < demo.metrics.brier_raw


def test_the_demo_artefact_takes_overconfidence_away() -> None:
    demo = load_calibrator(DEMO.read_text(), file="demo.json")
    values = {"mean_logprob": -0.03}
    raw = score(values)
    assert raw is not None
    assert raw > 0.95
    assert demo.confidence(values) < 0.6


CERTIFICATE = {"mode": "certified", "alpha": 0.02, "delta": 0.05, "threshold": 0.9, "n": 500}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {}),
        ({"tier": "low"}, {}),
        ({"tier": "low"}, {"task": "t"}),
        ({"task": "t"}, {"task": "t"}),
    ],
)
def test_at_most_one_certificate_is_for_a_response(
    one: dict[str, str], other: dict[str, str]
) -> None:
    document = {**ARTEFACT, "certificates": [{**CERTIFICATE, **one}, {**CERTIFICATE, **other}]}
    with pytest.raises(CalibrationError, match="two certificates are for the same responses"):
        load_calibrator(json.dumps(document), file="c.json")


def test_certificates_are_found_by_task_and_tier() -> None:
    document = {
        **ARTEFACT,
        "certificates": [
            {**CERTIFICATE, "tier": "low", "threshold": 0.7},
            {**CERTIFICATE, "tier": "high", "task": "refund", "threshold": None},
        ],
    }
    calibrator = load_calibrator(json.dumps(document), file="c.json")
    low, high = calibrator.certificates
    assert calibrator.certified_for("refund") == (low, high)
    assert calibrator.certified_for("other") == calibrator.certified_for(None) == (low,)
    assert certificate_for(calibrator.certificates, RiskTier.HIGH) is high
    assert certificate_for(calibrator.certificates, RiskTier.CRITICAL) is None


def scaled(scale: dict[str, Any], of: str) -> LogisticScore:
    said = {"kind": "logistic", "intercept": 0, "coefficients": {"n_tokens": 1}}
    return LogisticScore.model_validate_json(json.dumps({**said, "scales": {of: scale}}))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"x": [0, 1], "z": [0]}, "at least 2"),
        ({"x": [0, 0], "z": [-1, 1]}, "increase strictly"),
        ({"x": [0, 1], "z": [1, -1]}, "increase strictly"),
        ({"x": [0, 1, 2], "z": [-1, 1]}, "3 values and z has 2"),
        ({"x": [0, math.inf], "z": [-1, 1]}, "finite"),
    ],
)
def test_a_scale_that_does_not_rise_is_refused(scale: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        scaled(scale, "n_tokens")


def test_a_scale_without_a_coefficient_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"no coefficient, for min_logprob"):
        scaled({"x": [0, 1], "z": [-1, 1]}, "min_logprob")
