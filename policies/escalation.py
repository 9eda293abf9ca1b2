"""When a judge is sure enough: thresholds for a cascade of judges, certified for agreement with people.

A judge's score s is its probability that the answer is acceptable, and max(s, 1 - s) how sure it is.
With one threshold t for all of them, the first judge that is at least that sure decides; nobody sure,
a person does. `fit_threshold` finds the lowest t for which it is certain enough that people agree with
those decisions.

References
----------
Jung, Brahman and Choi (2024), "Trust or Escalate: LLM Judges with Provable Guarantees for Human
Agreement", arXiv 2407.18370, algorithm 1. Fixed-sequence testing: Bauer (1991), "Multiple Testing in
Clinical Trials"; from several starts: Angelopoulos et al. (2021), "Learn then Test", section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from policies.agreement import Confusion, binomial_cdf, confusion

#: The scores of one answer by the judges of a cascade, in its order; None where a judge could not tell.
Row: TypeAlias = Sequence[float | None]

#: Further starts of the test, at ever smaller shares, are made only where they rest on so many answers.
_START_AT_LEAST = 100

#: The sequence goes on in steps of this share of the answers.
_STEPS = 20

#: A threshold lies up to two millionths below the sureness it comes from, so that no rounding decides.
_DIGITS = 6


class Settled(NamedTuple):
    """Which judge of the cascade decided, from 0, and what."""

    judge: int
    passed: bool


def settle(row: Row, threshold: float) -> Settled | None:
    """The decision of the first judge that is sure enough; None if none is.

    Examples
    --------
    >>> settle([0.8, 0.03], 0.9)
    Settled(judge=1, passed=False)
    """
    fail_at = mirrored(threshold)
    for judge, score in enumerate(row):
        if score is not None and score >= threshold:
            return Settled(judge, passed=True)
        if score is not None and score <= fail_at:
            return Settled(judge, passed=False)
    return None


def mirrored(threshold: float) -> float:
    """The score at or below which a judge is as sure of a fail; without the noise of binary fractions.

    Examples
    --------
    >>> mirrored(0.9), 1 - 0.9
    (0.1, 0.09999999999999998)
    """
    return round(1.0 - threshold, _DIGITS)


def fit_threshold(
    rows: Sequence[Row], labels: Sequence[bool], *, target_agreement: float, delta: float
) -> float | None:
    """The lowest threshold at which people agree with the decided share of answers, certified.

    Parameters
    ----------
    rows : n answers, each with the scores in [0, 1] of the same k >= 1 judges
        A random sample of what the cascade will see, or the promise does not carry over.
    labels : n labels; True means acceptable
    target_agreement : in (0, 1)
        The share of the cascade's decisions with which people must agree.
    delta : in (0, 1)
        How likely the threshold may be wrong: over many samples, at most this share of thresholds
        break the target.

    Returns
    -------
    float or None
        In (0.5, 1]. None if no threshold can be certified with these labels: then all go to a person.

    Raises
    ------
    ValueError
        If lengths differ, a score is not in [0, 1], or a target is out of range.

    Notes
    -----
    The sequence goes from sure to unsure along the answers ranked by the surest of their judges; at
    each step the whole cascade, with the sureness of the answer at that rank as its threshold, is
    tested by an exact binomial test at level `delta`, and the first failure ends it. The order does
    not look at labels, so no correction for the number of steps is due. The answer that gives the
    threshold is left out of the test: given it, the others that are decided are an independent sample
    of all that would be.

    One joint sequence instead of one for each judge at `delta / k`: what is promised is the agreement
    of the cascade, so nothing is gained by proving it for each judge, and every test has the answers
    of all judges to rest on.

    `starts` says where it begins; several starts share `delta` evenly.
    """
    if not 0.0 < target_agreement < 1.0 or not 0.0 < delta < 1.0:
        raise ValueError("target_agreement and delta must lie between 0 and 1")
    if len(rows) != len(labels):
        raise ValueError(f"{len(rows)} rows of scores and {len(labels)} labels do not go together")
    sureness = [_sureness(row) for row in rows]
    ranked = sorted(range(len(rows)), key=sureness.__getitem__, reverse=True)
    begins = starts(len(rows))
    found: list[float] = []
    for begin in begins:
        for rank in range(begin, len(rows), max(len(rows) // _STEPS, 1)):
            chosen = ranked[rank]
            threshold = round(sureness[chosen] - 10**-_DIGITS, _DIGITS)
            if threshold <= 0.5:
                break
            others = [i for i in ranked if i != chosen]
            if _chance(rows, labels, others, threshold, target_agreement) > delta / len(begins):
                break
            found.append(threshold)
    return min(found, default=None)


def _chance(
    rows: Sequence[Row],
    labels: Sequence[bool],
    some: Sequence[int],
    threshold: float,
    target_agreement: float,
) -> float:
    """How likely so few errors among some answers would be if people agreed with just the target's share (a p-value)."""
    right = [settled.passed == labels[i] for i in some if (settled := settle(rows[i], threshold))]
    return binomial_cdf(right.count(False), len(right), 1.0 - target_agreement)


def starts(n: int) -> list[int]:
    """The ranks at which the test begins with n answers, largest first.

    Half of the answers, not the surest few: there a single error ends the test before it has begun,
    and judges, that like to be certain, err there as well. With more answers a quarter, an eighth and
    so on too, as long as a start rests on 100 answers.

    Examples
    --------
    >>> starts(125), starts(1000)
    ([62], [500, 250, 125])
    """
    begins = [n // 2]
    while begins[-1] // 2 >= _START_AT_LEAST:
        begins.append(begins[-1] // 2)
    return begins


def _sureness(row: Row) -> float:
    scores = [score for score in row if score is not None]
    if not all(0.0 <= score <= 1.0 for score in scores):
        raise ValueError("a score is not in [0, 1]")
    return max((max(score, 1.0 - score) for score in scores), default=0.0)


class Tally(NamedTuple):
    """What a cascade with a threshold does with n labelled answers.

    `asked` and `decided` count answers by judge; `outcomes` are the decisions against the labels.
    """

    n: int
    asked: tuple[int, ...]
    decided: tuple[int, ...]
    outcomes: Confusion

    @property
    def coverage(self) -> float:
        """The share in [0, 1] of answers that need no person."""
        return sum(self.decided) / self.n if self.n else 0.0


def tally(rows: Sequence[Row], labels: Sequence[bool], threshold: float) -> Tally:
    """Run the cascade over labelled answers; with a threshold above 1 no judge decides any.

    Raises
    ------
    ValueError
        If lengths differ.
    """
    width = len(rows[0]) if rows else 0
    asked, decided = [0] * width, [0] * width
    verdicts, truths = [], []
    for row, label in zip(rows, labels, strict=True):
        settled = settle(row, threshold)
        for judge in range(width if settled is None else settled.judge + 1):
            asked[judge] += 1
        if settled is not None:
            decided[settled.judge] += 1
            verdicts.append(settled.passed)
            truths.append(label)
    return Tally(len(rows), tuple(asked), tuple(decided), confusion(verdicts, truths))
