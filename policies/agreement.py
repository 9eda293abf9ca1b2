"""How far a judge can be trusted: its verdicts against people's labels, with intervals.

Everything here is exact arithmetic on counts, in plain Python. An interval is two-sided and at 95 %
unless told otherwise; a figure that the counts cannot give (a share of nothing) is None, never a
number made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import atanh, exp, fsum, inf, lgamma, log, log1p, sqrt, tanh
from statistics import NormalDist, correlation
from typing import NamedTuple

LEVEL = 0.95


class Measure(NamedTuple):
    """A figure, and the ends of its interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, level: float = LEVEL) -> Measure | None:
    """The share `successes / n` with its score interval; None for n = 0.

    References
    ----------
    Wilson (1927), "Probable Inference, the Law of Succession, and Statistical Inference".

    Examples
    --------
    >>> [round(end, 3) for end in wilson(9, 10)]
    [0.9, 0.596, 0.982]
    """
    if n == 0:
        return None
    z, share = _z(level), successes / n
    centre = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return Measure(
        share,
        max((centre - spread) / scale, 0.0) if successes else 0.0,
        min((centre + spread) / scale, 1.0) if successes < n else 1.0,
    )


def clopper_pearson(successes: int, n: int, level: float = LEVEL) -> Measure | None:
    """The share `successes / n` with its exact interval, which covers at least `level`; None for n = 0.

    References
    ----------
    Clopper and Pearson (1934), "The Use of Confidence or Fiducial Limits Illustrated in the Case of
    the Binomial".

    Examples
    --------
    >>> [round(end, 3) for end in clopper_pearson(9, 10)]
    [0.9, 0.555, 0.997]
    """
    if n == 0:
        return None
    tail = (1 - level) / 2
    return Measure(
        successes / n,
        1 - _upper(n - successes, n, tail),
        _upper(successes, n, tail),
    )


def contradicted(share: float, n: int, errors: int, level: float = 0.05) -> bool:
    """Whether so many errors among n have a chance of less than the level if their true share is this one (exact binomial)."""
    return 1.0 - binomial_cdf(errors - 1, n, share) < level


def binomial_cdf(k: int, n: int, p: float) -> float:
    """The probability of at most k successes in n >= 0 independent trials, each with probability p.

    Examples
    --------
    >>> round(binomial_cdf(1, 2, 0.5), 12)
    0.75
    """
    if k < 0:
        return 0.0
    if k >= n or p <= 0.0:
        return 1.0
    if p >= 1.0:
        return 0.0
    log_p, log_q, total = log(p), log1p(-p), lgamma(n + 1)
    terms = (
        exp(total - lgamma(i + 1) - lgamma(n - i + 1) + i * log_p + (n - i) * log_q)
        for i in range(k + 1)
    )
    return min(fsum(terms), 1.0)


def _upper(k: int, n: int, tail: float) -> float:
    """The p at which k or fewer of n have the probability `tail`: where the distribution function crosses it."""
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(k, n, middle) > tail else (low, middle)
    return high


class Confusion(NamedTuple):
    """Verdicts against labels, counted."""

    right_passes: int
    wrong_passes: int
    right_fails: int
    wrong_fails: int

    @property
    def n(self) -> int:
        """How many verdicts have a label."""
        return sum(self)

    @property
    def agreement(self) -> Measure | None:
        """The share of verdicts that agree with the label."""
        return wilson(self.right_passes + self.right_fails, self.n)

    @property
    def precision(self) -> Measure | None:
        """The share of acceptable answers among those passed."""
        return wilson(self.right_passes, self.right_passes + self.wrong_passes)

    @property
    def recall(self) -> Measure | None:
        """The share of the acceptable answers that are passed: the sensitivity."""
        return wilson(self.right_passes, self.right_passes + self.wrong_fails)

    @property
    def false_accept_rate(self) -> Measure | None:
        """The share of the unacceptable answers that are passed: one less the specificity."""
        return wilson(self.wrong_passes, self.wrong_passes + self.right_fails)

    @property
    def kappa(self) -> Measure | None:
        """Cohen's kappa, agreement beyond what chance would give; None if all verdicts and all labels are the same.

        The interval is that of a large sample, cut at -1 and 1.

        References
        ----------
        Cohen (1960), "A Coefficient of Agreement for Nominal Scales". Fleiss, Cohen and Everitt
        (1969), "Large Sample Standard Errors of Kappa and Weighted Kappa", equation 13.
        """
        if not self.n:
            return None
        cells = [count / self.n for count in self]
        both_pass, judge_only, both_fail, label_only = cells
        judge, label = both_pass + judge_only, both_pass + label_only
        agreed = both_pass + both_fail
        chance = judge * label + (1 - judge) * (1 - label)
        if chance >= 1.0:
            return None
        kappa = (agreed - chance) / (1 - chance)
        # How far each cell moves the estimate; with both judges two-valued the terms are these four.
        agreeing = (
            both_pass * (1 - (judge + label) * (1 - kappa)) ** 2
            + both_fail * (1 - (2 - judge - label) * (1 - kappa)) ** 2
        )
        differing = (1 - kappa) ** 2 * (
            judge_only * (label + 1 - judge) ** 2 + label_only * (judge + 1 - label) ** 2
        )
        variance = agreeing + differing - (kappa - chance * (1 - kappa)) ** 2
        spread = _z(LEVEL) * sqrt(max(variance, 0.0) / self.n) / (1 - chance)
        return Measure(kappa, max(kappa - spread, -1.0), min(kappa + spread, 1.0))


def confusion(verdicts: Sequence[bool], labels: Sequence[bool]) -> Confusion:
    """Count n verdicts (True: passed) against n labels (True: acceptable).

    Raises
    ------
    ValueError
        If lengths differ.
    """
    pairs = list(zip(verdicts, labels, strict=True))
    return Confusion(
        right_passes=pairs.count((True, True)),
        wrong_passes=pairs.count((True, False)),
        right_fails=pairs.count((False, False)),
        wrong_fails=pairs.count((False, True)),
    )


def corrected_rate(passed: int, n: int, known: Confusion, level: float = LEVEL) -> Measure | None:
    """The share of acceptable answers among n of which the judge passed so many, corrected for its errors.

    Parameters
    ----------
    passed, n : 0 <= passed <= n
        Of a sample without labels, judged by the same judge.
    known : Confusion
        The judge's verdicts on a sample with labels, independent of the other; n need not be large.

    Returns
    -------
    Measure or None
        The Rogan-Gladen estimate and an interval that takes into account that sensitivity and
        specificity are estimates too; all cut at 0 and 1. None if a class has no labels, or the
        judge is no better than chance (sensitivity + specificity <= 1): then nothing follows.

    References
    ----------
    Rogan and Gladen (1978), "Estimating Prevalence from the Results of a Screening Test". Lang and
    Reiczigel (2014), "Confidence limits for prevalence of disease adjusted for estimated sensitivity
    and specificity", equations 14 to 16. Lee et al. (2025), arXiv 2511.21140, do the same for judges.
    """
    acceptable = known.right_passes + known.wrong_fails
    unacceptable = known.right_fails + known.wrong_passes
    if not (n and acceptable and unacceptable):
        return None
    raw = passed / n
    sensitivity, specificity = known.right_passes / acceptable, known.right_fails / unacceptable
    if sensitivity + specificity <= 1.0:
        return None
    estimate = (raw + specificity - 1) / (sensitivity + specificity - 1)

    z = _z(level)
    # As Agresti and Coull: shares are shrunk a little, and counts grow accordingly.
    n_raw, n_sens, n_spec = n + z * z, acceptable + 2, unacceptable + 2
    raw = (passed + z * z / 2) / n_raw
    sensitivity = (known.right_passes + 1) / n_sens
    specificity = (known.right_fails + 1) / n_spec
    youden = sensitivity + specificity - 1
    if youden <= 0.0:
        return None
    shrunk = (raw + specificity - 1) / youden
    of_sens = sensitivity * (1 - sensitivity) / n_sens
    of_spec = specificity * (1 - specificity) / n_spec
    shift = 2 * z * z * (shrunk * of_sens - (1 - shrunk) * of_spec)
    variance = raw * (1 - raw) / n_raw + shrunk**2 * of_sens + (1 - shrunk) ** 2 * of_spec
    spread = z * sqrt(variance) / youden
    return Measure(_cut(estimate), _cut(shrunk + shift - spread), _cut(shrunk + shift + spread))


class PositionBias(NamedTuple):
    """What swapping the order of two answers changes.

    `consistent` is the share of pairs with the same verdict in both orders; `given` the share of the
    others that pass in the given order only, 0.5 without bias, None if there are none.
    """

    consistent: Measure
    given: Measure | None


def position_bias(verdicts: Sequence[tuple[bool, bool]]) -> PositionBias | None:
    """Whether the place decides, from verdicts on the same question in the given and the swapped order.

    Where the question is which of two answers is better, let a verdict say whether it is the one that
    is shown first in the given order: `given` is then the share of inconsistent pairs in which the
    first place won both times. None without pairs.

    References
    ----------
    Zheng et al. (2023), "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", section 3.3, who
    call the first figure consistency.
    """
    consistent = wilson(sum(given == swapped for given, swapped in verdicts), len(verdicts))
    if consistent is None:
        return None
    inconsistent = [given for given, swapped in verdicts if given != swapped]
    return PositionBias(consistent, clopper_pearson(sum(inconsistent), len(inconsistent)))


def length_bias(
    scores: Sequence[float], lengths: Sequence[int], labels: Sequence[bool]
) -> Measure | None:
    """How far longer answers score higher among answers that people find equally good, in [-1, 1].

    Spearman's rank correlation of score and length with the label held fixed (partial correlation);
    0 without bias. The interval is Fisher's, with the wider variance of ranks.

    None for fewer than 6 rows, or if score or length is constant once the label is held fixed.

    Raises
    ------
    ValueError
        If lengths differ.

    References
    ----------
    Fisher (1924), "The Distribution of the Partial Correlation Coefficient" (one degree of freedom
    less). Fieller, Hartley and Pearson (1957), "Tests for Rank Correlation Coefficients" (1.06).
    Dubois et al. (2024), "Length-Controlled AlpacaEval", on why length misleads judges.
    """
    if not len(scores) == len(lengths) == len(labels):
        raise ValueError("scores, lengths and labels must be as many")
    if len(scores) < 6:
        return None
    score_ranks = _without_label(_ranks(scores), labels)
    length_ranks = _without_label(_ranks(lengths), labels)
    if _is_constant(score_ranks) or _is_constant(length_ranks):
        return None
    partial = max(-1.0, min(1.0, correlation(score_ranks, length_ranks)))
    if abs(partial) >= 1.0:
        return Measure(partial, partial, partial)
    spread = _z(LEVEL) * sqrt(1.06 / (len(scores) - 4))
    return Measure(partial, tanh(atanh(partial) - spread), tanh(atanh(partial) + spread))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, begin = [0.0] * len(values), 0
    for _, group in groupby(order, key=values.__getitem__):
        members = list(group)
        for member in members:
            ranks[member] = begin + (len(members) - 1) / 2
        begin += len(members)
    return ranks


def _without_label(values: Sequence[float], labels: Sequence[bool]) -> list[float]:
    """Each value's distance from the mean of its label."""
    means = {}
    for label in set(labels):
        own = [value for value, its in zip(values, labels, strict=True) if its == label]
        means[label] = fsum(own) / len(own)
    return [value - means[label] for value, label in zip(values, labels, strict=True)]


def _is_constant(values: Sequence[float]) -> bool:
    low, high = min(values, default=inf), max(values, default=inf)
    return high - low < 1e-9


def _cut(share: float) -> float:
    return max(0.0, min(1.0, share))


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
