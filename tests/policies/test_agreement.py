"""Figures of agreement: against other people's implementations, against enumeration, and by simulation."""

from __future__ import annotations

import random
from itertools import product
from math import comb, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr
from sklearn.metrics import cohen_kappa_score

from policies.agreement import (
    Confusion,
    binomial_cdf,
    clopper_pearson,
    confusion,
    corrected_rate,
    length_bias,
    position_bias,
    wilson,
)

counts = st.integers(0, 60)
tables = st.builds(Confusion, counts, counts, counts, counts)


@st.composite
def shares(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 400))
    return draw(st.integers(0, n)), n


class TestShares:
    @given(shares(), st.sampled_from([0.8, 0.95, 0.99]))
    def test_both_intervals_are_those_of_scipy(self, share: tuple[int, int], level: float) -> None:
        k, n = share
        for method, ours in (("wilson", wilson), ("exact", clopper_pearson)):
            measured = ours(k, n, level)
            theirs = binomtest(k, n).proportion_ci(level, method)
            assert measured is not None
            assert measured == pytest.approx((k / n, theirs.low, theirs.high), abs=1e-9)

    def test_a_share_of_nothing_is_not_known(self) -> None:
        assert wilson(0, 0) is None
        assert clopper_pearson(0, 0) is None

    @given(st.integers(0, 40), st.integers(-1, 41), st.floats(0, 1))
    def test_the_distribution_function_is_the_sum_of_its_terms(
        self, n: int, k: int, p: float
    ) -> None:
        terms = [comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(min(k, n) + 1)]
        assert binomial_cdf(k, n, p) == pytest.approx(min(sum(terms), 1.0), abs=1e-12)

    def test_what_is_certain_or_impossible_is_so(self) -> None:
        assert [binomial_cdf(k, 3, 1.0) for k in (-1, 2, 3)] == [0, 0, 1]
        assert [binomial_cdf(k, 3, 0.0) for k in (-1, 0)] == [0, 1]

    def test_the_exact_interval_covers_in_every_experiment_it_may_meet(self) -> None:
        """Clopper and Pearson's promise, by enumeration: at least 95 % whatever the true share."""
        n = 25
        intervals = [clopper_pearson(k, n) for k in range(n + 1)]
        for p in (step / 200 for step in range(1, 200)):
            covered = sum(
                comb(n, k) * p**k * (1 - p) ** (n - k)
                for k, interval in enumerate(intervals)
                if interval is not None and interval.low <= p <= interval.high
            )
            assert covered >= 0.95 - 1e-9


class TestConfusion:
    def test_each_verdict_falls_into_its_cell(self) -> None:
        verdicts, labels = [True, True, True, False, False], [True, True, False, False, True]
        assert confusion(verdicts, labels) == Confusion(2, 1, 1, 1)

    def test_verdicts_without_a_label_each_are_refused(self) -> None:
        with pytest.raises(ValueError, match="argument 2 is shorter"):
            confusion([True, False], [True])

    def test_rates_are_the_ratios_that_their_names_say(self) -> None:
        table = Confusion(right_passes=60, wrong_passes=10, right_fails=20, wrong_fails=10)
        rates = (table.agreement, table.precision, table.recall, table.false_accept_rate)
        values = [rate.value for rate in rates if rate]
        assert values == pytest.approx([0.8, 60 / 70, 60 / 70, 10 / 30])

    def test_rates_of_nothing_are_not_known(self) -> None:
        nothing = Confusion(0, 0, 0, 0)
        assert {nothing.agreement, nothing.precision, nothing.recall, nothing.kappa} == {None}
        assert Confusion(5, 0, 0, 0).false_accept_rate is None

    @given(tables)
    def test_kappa_is_that_of_scikit_learn(self, table: Confusion) -> None:
        cells = product((True, False), repeat=2)
        pairs = [
            pair
            for pair, count in zip(
                cells,
                (table.right_passes, table.wrong_passes, table.wrong_fails, table.right_fails),
                strict=True,
            )
            for _ in range(count)
        ]
        verdicts, labels = [one for one, _ in pairs], [other for _, other in pairs]
        kappa = table.kappa
        if len(set(verdicts)) < 2 and verdicts == labels:
            assert kappa is None
        else:
            assert kappa is not None
            assert kappa.value == pytest.approx(cohen_kappa_score(verdicts, labels), abs=1e-9)
            assert -1 <= kappa.low <= kappa.value <= kappa.high <= 1

    def test_the_variance_of_kappa_is_simple_where_all_margins_are_one_half(self) -> None:
        """Then the formula comes down to (1 - kappa ** 2) / n."""
        kappa = Confusion(40, 10, 40, 10).kappa
        assert kappa is not None
        spread = 1.959964 * sqrt((1 - 0.6**2) / 100)
        assert kappa == pytest.approx((0.6, 0.6 - spread, 0.6 + spread), abs=1e-6)

    def test_the_interval_of_kappa_covers_as_often_as_it_says(self) -> None:
        chance, covered = random.Random(3), 0
        cells = (0.55, 0.1, 0.25, 0.1)
        judge, label = cells[0] + cells[1], cells[0] + cells[3]
        expected = judge * label + (1 - judge) * (1 - label)
        truth = (cells[0] + cells[2] - expected) / (1 - expected)
        for _ in range(600):
            drawn = chance.choices(range(4), cells, k=150)
            kappa = Confusion(*(drawn.count(cell) for cell in range(4))).kappa
            covered += kappa is not None and kappa.low <= truth <= kappa.high
        assert 0.92 <= covered / 600 <= 0.98


class TestCorrectedRate:
    @given(tables, shares())
    def test_it_is_a_share_with_an_interval_around_or_not_known(
        self, known: Confusion, judged: tuple[int, int]
    ) -> None:
        corrected = corrected_rate(*judged, known)
        if corrected is not None:
            assert 0 <= corrected.low <= corrected.high <= 1
            assert 0 <= corrected.value <= 1

    def test_a_perfect_judge_needs_no_correction(self) -> None:
        corrected = corrected_rate(30, 100, Confusion(5_000, 0, 5_000, 0))
        plain = wilson(30, 100)
        assert corrected is not None
        assert plain is not None
        assert corrected == pytest.approx(plain, abs=0.005)

    def test_a_lenient_judge_is_corrected_downwards(self) -> None:
        """Half are acceptable; the judge passes 90 % of those and 40 % of the others, so 65 % of all."""
        corrected = corrected_rate(650, 1_000, Confusion(900, 400, 600, 100))
        assert corrected is not None
        assert corrected.value == pytest.approx(0.5)
        assert corrected.low < 0.5 < corrected.high < 0.65

    @pytest.mark.parametrize(
        "known",
        [
            Confusion(50, 50, 50, 50),
            Confusion(20, 80, 20, 80),
            Confusion(90, 0, 0, 10),
            # One right pass and one right fail are not enough to tell it from chance.
            Confusion(1, 99, 1, 0),
        ],
    )
    def test_nothing_follows_from_a_judge_no_better_than_chance_or_never_tested(
        self, known: Confusion
    ) -> None:
        assert corrected_rate(30, 100, known) is None

    def test_few_labels_widen_the_interval(self) -> None:
        many = corrected_rate(650, 1_000, Confusion(900, 400, 600, 100))
        few = corrected_rate(650, 1_000, Confusion(18, 8, 12, 2))
        assert many is not None
        assert few is not None
        assert few.high - few.low > 2 * (many.high - many.low)

    @pytest.mark.parametrize(
        ("truth", "sensitivity", "specificity"),
        [(0.7, 0.9, 0.7), (0.3, 0.85, 0.7), (0.9, 0.95, 0.6)],
    )
    def test_the_interval_covers_as_often_as_it_says(
        self, truth: float, sensitivity: float, specificity: float
    ) -> None:
        chance, covered, plain = random.Random(5), 0, 0

        def draw(n: int, p: float) -> int:
            return sum(chance.random() < p for _ in range(n))

        for _ in range(400):
            right_passes, right_fails = draw(60, sensitivity), draw(60, specificity)
            known = Confusion(right_passes, 60 - right_fails, right_fails, 60 - right_passes)
            passed = draw(200, truth * sensitivity + (1 - truth) * (1 - specificity))
            corrected = corrected_rate(passed, 200, known)
            covered += corrected is not None and corrected.low <= truth <= corrected.high
            raw = wilson(passed, 200)
            plain += raw is not None and raw.low <= truth <= raw.high
        assert covered / 400 >= 0.93
        assert plain / 400 < covered / 400


class TestBiases:
    def test_a_judge_that_always_takes_the_first_is_seen_through(self) -> None:
        bias = position_bias([(True, False)] * 30)
        assert bias is not None
        assert bias.consistent.value == 0
        assert bias.given is not None
        assert bias.given.low > 0.5

    def test_a_judge_that_does_not_look_at_the_place_is_consistent(self) -> None:
        bias = position_bias([(True, True), (False, False)] * 10)
        assert bias is not None
        assert bias.consistent.value == 1
        assert bias.given is None
        assert position_bias([]) is None

    @given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
    def test_swapping_the_orders_mirrors_the_bias(self, verdicts: list[tuple[bool, bool]]) -> None:
        bias = position_bias(verdicts)
        mirrored = position_bias([(swapped, given) for given, swapped in verdicts])
        assert bias is not None
        assert mirrored is not None
        assert bias.consistent == mirrored.consistent
        if bias.given is not None and mirrored.given is not None:
            assert bias.given.value == pytest.approx(1 - mirrored.given.value)

    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50)), min_size=6, max_size=80))
    def test_with_one_label_it_is_spearmans_correlation(
        self, rows: list[tuple[float, int]]
    ) -> None:
        scores, lengths = [row[0] for row in rows], [row[1] for row in rows]
        bias = length_bias(scores, lengths, [True] * len(rows))
        if len(set(scores)) == 1 or len(set(lengths)) == 1:
            assert bias is None
        else:
            assert bias is not None
            assert bias.value == pytest.approx(spearmanr(scores, lengths).statistic, abs=1e-9)
            assert -1 <= bias.low <= bias.value <= bias.high <= 1

    def test_that_good_answers_are_longer_is_no_bias(self) -> None:
        chance = random.Random(1)
        labels = [chance.random() < 0.5 for _ in range(400)]
        lengths = [chance.randrange(100) + 200 * label for label in labels]
        scores = [0.2 + 0.6 * label + 0.2 * chance.random() for label in labels]
        naive = spearmanr(scores, lengths).statistic
        bias = length_bias(scores, lengths, labels)
        assert naive > 0.7
        assert bias is not None
        assert bias.low < 0 < bias.high

    def test_that_long_answers_score_higher_is(self) -> None:
        chance = random.Random(2)
        labels = [chance.random() < 0.5 for _ in range(400)]
        lengths = [chance.randrange(1_000) for _ in labels]
        scores = [
            0.3 * label + 0.0004 * length + 0.3 * chance.random()
            for label, length in zip(labels, lengths, strict=True)
        ]
        bias = length_bias(scores, lengths, labels)
        assert bias is not None
        assert bias.low > 0.3

    def test_a_score_that_is_nothing_but_length_is_told(self) -> None:
        lengths = [3, 1, 4, 15, 9, 2, 6]
        bias = length_bias([length / 20 for length in lengths], lengths, [True] * 7)
        assert bias == pytest.approx((1, 1, 1))

    def test_too_few_or_uneven_rows_give_no_figure(self) -> None:
        assert length_bias([0.1] * 5, [1, 2, 3, 4, 5], [True] * 5) is None
        with pytest.raises(ValueError, match="as many"):
            length_bias([0.1], [1, 2], [True])
