"""Two thresholds cut calibrated confidence into three bands."""

from __future__ import annotations

from collections.abc import Sequence

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
    pair = thresholds.of(tier)
    confident: float | None = pair.confident
    if thresholds.from_calibrator:
        certificate = certificate_for(certificates, tier)
        confident = None if certificate is None else certificate.threshold
    if confident is not None and confidence >= confident:
        return Band.CONFIDENT
    return Band.UNSURE if confidence >= pair.unsure else Band.DOUBTFUL
