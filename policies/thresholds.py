"""Two thresholds cut calibrated confidence into three bands."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from policies.calibration import Certificate, certificate_for
from policies.model import Band, RiskTier, Thresholds


def band(
    confidence: float,
    thresholds: Thresholds,
    tier: RiskTier,
    certificates: Sequence[Certificate] = (),
) -> Band:
    """The band of a calibrated confidence in [0, 1] for a tier.

    Each threshold belongs to the band above it. NaN is doubtful. With `from_calibrator` the threshold of
    `confident` is that of the tier's certificate; without one, or where none was feasible, nothing is
    confident.

    Examples
    --------
    >>> band(0.95, Thresholds(confident=0.95, unsure=0.6), RiskTier.HIGH)
    <Band.CONFIDENT: 'confident'>
    """
    unsure, confident = _cuts(thresholds, tier, certificates)
    if confidence >= confident:
        return Band.CONFIDENT
    return Band.UNSURE if confidence >= unsure else Band.DOUBTFUL


def limits(
    where: Band,
    thresholds: Thresholds,
    tier: RiskTier,
    certificates: Sequence[Certificate] = (),
) -> tuple[float, float]:
    """The confidences of a band for a tier: the least, and the least that is above it (infinite if none is)."""
    unsure, confident = _cuts(thresholds, tier, certificates)
    match where:
        case Band.CONFIDENT:
            return confident, inf
        case Band.UNSURE:
            return unsure, confident
        case Band.DOUBTFUL:
            return 0.0, min(unsure, confident)


def _cuts(
    thresholds: Thresholds, tier: RiskTier, certificates: Sequence[Certificate]
) -> tuple[float, float]:
    """From where on a confidence is unsure, and from where on confident: infinite if nothing is."""
    pair = thresholds.of(tier)
    confident: float | None = pair.confident
    if thresholds.from_calibrator:
        certificate = certificate_for(certificates, tier)
        confident = None if certificate is None else certificate.threshold
    return pair.unsure, inf if confident is None else confident
