"""Bands: where a confidence lies between two thresholds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.calibration import Certificate
from policies.model import Band, RiskTier, ThresholdPair, Thresholds
from policies.thresholds import band, limits

PROBABILITY = st.floats(min_value=0, max_value=1)


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [
        (1.0, Band.CONFIDENT),
        (0.95, Band.CONFIDENT),
        (0.9499, Band.UNSURE),
        (0.6, Band.UNSURE),
        (0.5999, Band.DOUBTFUL),
        (0.0, Band.DOUBTFUL),
        (math.nan, Band.DOUBTFUL),
    ],
)
def test_thresholds_belong_to_the_band_above(confidence: float, expected: Band) -> None:
    assert band(confidence, Thresholds(confident=0.95, unsure=0.6), RiskTier.LOW) is expected


def test_a_tier_may_have_thresholds_of_its_own() -> None:
    thresholds = Thresholds(critical=ThresholdPair(confident=0.999, unsure=0.99))
    assert band(0.97, thresholds, RiskTier.CRITICAL) is Band.DOUBTFUL
    assert band(0.97, thresholds, RiskTier.HIGH) is Band.CONFIDENT


@given(PROBABILITY, PROBABILITY, PROBABILITY, PROBABILITY)
def test_more_confidence_is_never_a_worse_band(a: float, b: float, c: float, d: float) -> None:
    unsure, confident = sorted((a, b))
    low, high = sorted((c, d))
    thresholds = Thresholds(confident=confident, unsure=unsure)
    order = [Band.DOUBTFUL, Band.UNSURE, Band.CONFIDENT]
    lower, higher = (band(each, thresholds, RiskTier.HIGH) for each in (low, high))
    assert order.index(lower) <= order.index(higher)


def certificate(threshold: float | None, tier: RiskTier | None = None) -> Certificate:
    return Certificate(
        tier=tier, mode="certified", alpha=0.02, delta=0.05, threshold=threshold, n=500
    )


@pytest.mark.parametrize(
    ("certificates", "confidence", "expected"),
    [
        ([certificate(0.8)], 0.8, Band.CONFIDENT),
        ([certificate(0.8)], 0.79, Band.UNSURE),
        ([certificate(0.3)], 0.3, Band.CONFIDENT),
        ([certificate(None)], 1.0, Band.UNSURE),
        ([certificate(0.8, RiskTier.LOW)], 1.0, Band.UNSURE),
        ([certificate(0.8, RiskTier.LOW), certificate(0.9, RiskTier.HIGH)], 0.85, Band.UNSURE),
        ([], 1.0, Band.UNSURE),
        ([certificate(0.8)], math.nan, Band.DOUBTFUL),
    ],
)
def test_what_is_confident_is_what_a_certificate_is_for(
    certificates: list[Certificate], confidence: float, expected: Band
) -> None:
    thresholds = Thresholds(from_calibrator=True, unsure=0.5)
    assert band(confidence, thresholds, RiskTier.HIGH, certificates) is expected


def test_confident_is_not_written_twice() -> None:
    with pytest.raises(ValueError, match="leave out confident"):
        Thresholds(from_calibrator=True, confident=0.9)


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 0.95),
    st.sampled_from([None, 0.0, 0.3, 0.8, 1.0]),
)
def test_the_limits_of_a_band_hold_exactly_what_is_in_it(
    confidence: float, other: float, unsure: float, threshold: float | None
) -> None:
    thresholds = Thresholds(from_calibrator=True, unsure=unsure)
    promised = [certificate(threshold)]
    where = band(confidence, thresholds, RiskTier.LOW, promised)
    low, high = limits(where, thresholds, RiskTier.LOW, promised)
    assert low <= confidence < high
    is_same = band(other, thresholds, RiskTier.LOW, promised) is where
    assert is_same is (low <= other < high)
