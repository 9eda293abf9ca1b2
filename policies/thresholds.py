"""Two thresholds cut calibrated confidence into three bands."""

from __future__ import annotations

from policies.model import Band, RiskTier, Thresholds


def band(confidence: float, thresholds: Thresholds, tier: RiskTier) -> Band:
    """The band of a calibrated confidence in [0, 1] for a tier.

    Each threshold belongs to the band above it. NaN is doubtful.

    Examples
    --------
    >>> band(0.95, Thresholds(confident=0.95, unsure=0.6), RiskTier.HIGH)
    <Band.CONFIDENT: 'confident'>
    """
    pair = thresholds.of(tier)
    if confidence >= pair.confident:
        return Band.CONFIDENT
    return Band.UNSURE if confidence >= pair.unsure else Band.DOUBTFUL
