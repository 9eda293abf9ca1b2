"""Whether numbers still have the distribution that they had, with a stated rate of false alarms.

Plain Python, because it runs beside what answers requests.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import log, sqrt
from typing import NamedTuple

from policies.monitoring import ALPHA, chi_squared_quantile

Rank = tuple[int, int]
"""How many of a reference are less than a value, and how many are not more."""


def kolmogorov_smirnov(ranks: Sequence[Rank], n: int) -> float:
    """The greatest distance in [0, 1] of two distribution functions, from the sorted ranks of one sample in another of n.

    Neither is empty. Values that are equal make it smaller, so that a test with it errs on the quiet side.

    References
    ----------
    Smirnov (1939), "On the estimation of the discrepancy between empirical curves of distribution for two independent
    samples".

    Examples
    --------
    >>> reference = [0.1, 0.2, 0.3, 0.4]
    >>> kolmogorov_smirnov([rank(reference, value) for value in (0.3, 0.4, 0.5, 0.6)], 4)
    0.5
    """
    greatest, behind, m = 0.0, 0, len(ranks)
    for at, (less, not_more) in enumerate(ranks, 1):
        if at < m and ranks[at] == ranks[at - 1]:
            continue
        greatest = max(greatest, less / n - behind / m, at / m - not_more / n)
        behind = at
    return greatest


def rank(reference: Sequence[float], value: float) -> Rank:
    """The rank of a value in a sorted reference."""
    return bisect_left(reference, value), bisect_right(reference, value)


def critical_distance(n: int, m: int, p: float) -> float:
    """The distance that two samples of n and m of one distribution exceed with a probability of about p at most.

    References
    ----------
    Smirnov (1939): ``2 exp(-2 d**2 n m / (n + m))``, the first term of the limit, which is above it.
    """
    return sqrt(-log(p / 2) / 2 * (n + m) / (n * m))


class Binned(NamedTuple):
    """Two samples over bins of equal mass of the first: chi-squared with its degrees of freedom, and the stability index.

    The population stability index is 0 for equal shares; by custom 0.1 is notable and 0.25 is much.
    """

    statistic: float
    degrees: int
    stability: float


def binned(ranks: Sequence[Rank], reference: Sequence[float], bins: int = 20) -> Binned:
    """Compare a sample, by its sorted ranks, with a sorted reference, neither empty, over at most so many bins.

    Shares in the index are counted with half a case more, so that an empty bin is no infinity.

    References
    ----------
    Pearson (1900), for two samples. Yurdakul and Naranjo (2020), "Statistical properties of the population stability index".
    """
    n, m = len(reference), len(ranks)
    cuts = sorted({bisect_right(reference, reference[n * k // bins]) for k in range(1, bins)} - {n})
    found = [not_more for _, not_more in ranks]
    statistic = stability = 0.0
    old_ends, new_ends = [0, *cuts, n], [0, *(bisect_right(found, cut) for cut in cuts), m]
    counts = [
        (b - a, d - c)
        for (a, b), (c, d) in zip(pairwise(old_ends), pairwise(new_ends), strict=True)
    ]
    for old, new in counts:
        statistic += (m * old - n * new) ** 2 / (n * m * (old + new))
        old_share, new_share = (
            (old + 0.5) / (n + len(counts) / 2),
            (new + 0.5) / (m + len(counts) / 2),
        )
        stability += (new_share - old_share) * log(new_share / old_share)
    return Binned(statistic, len(cuts), stability)


#: How many of the latest values are compared: few find great changes soon, many find small ones at all.
WINDOWS = (100, 250, 500, 1000)
REFERENCE = 1000
HORIZON = 10_000
_LOOKS_A_WINDOW = 4
_TESTS = 2


class Drift(NamedTuple):
    """A distribution that has changed: the last `window` values against the reference.

    `test` is `ks` or `chi2`, whichever found it, and `critical` what its figure would still have been let pass. `before` and
    `after` are medians.
    """

    test: str
    window: int
    distance: float
    chi2: float
    critical: float
    stability: float
    before: float
    after: float


@dataclass(slots=True)
class DriftMonitor:
    """Whether a stream of numbers still has the distribution that its first REFERENCE values had.

    The last 100, 250, 500 and 1000 values are compared with the reference, four times while a window fills anew: by
    Kolmogorov's and Smirnov's distance, which sees what moves, and by chi-squared over up to 20 bins (at least ten expected in
    each), which sees what changes its shape. `series` is how many monitors share one promise: if nothing changes, one of
    them gives an alarm within HORIZON values with a probability of at most ALPHA (Bonferroni over series, windows, tests
    and looks, so in truth less: they overlap).
    """

    reference: list[float] = field(default_factory=list)
    recent: deque[Rank] = field(default_factory=lambda: deque(maxlen=WINDOWS[-1]))
    seen: int = 0

    def add(self, value: float, series: int = 1) -> Drift | None:
        """Take in one more value, and give the drift that shows; None if none does, or it is not yet time to look."""
        if len(self.reference) < REFERENCE:
            self.reference.append(value)
            if len(self.reference) == REFERENCE:
                self.reference.sort()
            return None
        self.recent.append(rank(self.reference, value))
        self.seen += 1
        due = (
            window
            for window in WINDOWS
            if self.seen >= window and self.seen % (window // _LOOKS_A_WINDOW) == 0
        )
        looks = (self._look(window, series) for window in due)
        return next((found for found in looks if found is not None), None)

    def _look(self, window: int, series: int) -> Drift | None:
        looks = HORIZON * _LOOKS_A_WINDOW / window
        p = ALPHA / (series * len(WINDOWS) * _TESTS * looks)
        ranks = sorted(list(self.recent)[-window:])
        distance = kolmogorov_smirnov(ranks, REFERENCE)
        bins = binned(ranks, self.reference, min(20, window // 10))
        test, critical = "ks", critical_distance(REFERENCE, window, p)
        if distance <= critical:
            if not bins.degrees:
                return None
            test, critical = "chi2", chi_squared_quantile(bins.degrees, p)
            if bins.statistic <= critical:
                return None
        middle = min(ranks[window // 2][0], REFERENCE - 1)
        return Drift(
            test,
            window,
            distance,
            bins.statistic,
            critical,
            bins.stability,
            self.reference[REFERENCE // 2],
            self.reference[middle],
        )
