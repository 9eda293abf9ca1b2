"""The maths of the monitors: against other implementations, and by simulation with known truth."""

from __future__ import annotations

from itertools import combinations
from math import inf, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, chi2_contingency, ks_2samp

from policies.auditing import Spread
from policies.drift import (
    HORIZON,
    REFERENCE,
    DriftMonitor,
    binned,
    kolmogorov_smirnov,
    rank,
)
from policies.monitoring import (
    ALPHA,
    REFERENCE_PAIRS,
    AgreementMonitor,
    Audited,
    ErrorCusum,
    agreement,
    chi_squared_quantile,
    error_escape,
    miscalibration,
)

values = st.lists(st.integers(0, 9).map(float) | st.floats(0, 1), min_size=2, max_size=60)


class TestErrorEscape:
    @given(
        st.lists(
            st.tuples(st.floats(0.05, 1), st.integers(0, 200), st.integers(0, 200)), max_size=5
        ),
        st.floats(0.8, 0.99),
    )
    def test_the_interval_is_around_the_estimate_and_wider_with_more_confidence(
        self, counts: list[tuple[float, int, int]], level: float
    ) -> None:
        rows = [Audited(share, n + errors, errors) for share, n, errors in counts]
        found, wider = error_escape(rows, level), error_escape(rows, (1 + level) / 2)
        assert 0 <= wider.low <= found.low <= found.high <= wider.high <= 1
        if found.estimate is None:
            assert (found.low, found.high, found.reviewed) == (0, 1, 0)
        else:
            assert found.low <= found.estimate <= found.high

    def test_without_errors_more_reviews_prove_more(self) -> None:
        highs = [error_escape([Audited(1.0, n, 0)]).high for n in (10, 100, 1000, 10_000)]
        assert highs == sorted(highs, reverse=True)
        assert highs[1] < 0.07
        assert highs[3] < 0.001

    def test_weights_take_back_what_the_drawing_gave(self) -> None:
        drawn = [Audited(0.1, 1000, 500), Audited(1.0, 400, 4)]
        estimate = error_escape(drawn).estimate
        assert estimate == pytest.approx((0.1 * 500 + 4) / (0.1 * 1000 + 400))

    @pytest.mark.parametrize("truth", [0.005, 0.02, 0.15])
    def test_the_interval_holds_while_one_looks_again_and_again(self, truth: float) -> None:
        draw, misses, runs = np.random.default_rng(1), 0, 100
        for _ in range(runs):
            errors = np.cumsum(draw.random(600) < truth)
            looks = (
                error_escape([Audited(1.0, n, int(errors[n - 1]))]) for n in range(10, 601, 60)
            )
            misses += any(not look.low <= truth <= look.high for look in looks)
        assert misses <= 0.05 * runs

    @pytest.mark.parametrize(("is_spread", "runs", "looks"), [(False, 40, 20), (True, 20, 10)])
    def test_held_items_and_a_tenth_of_the_rest_give_the_whole_without_bias(
        self, is_spread: bool, runs: int, looks: int
    ) -> None:
        draw, misses, estimates, naive = np.random.default_rng(2), 0, [], []
        knots = np.linspace(0.8, 0.999, 40)
        spread = Spread((float(each), float(1 - each**8)) for each in knots)
        n, floor = 6000, 0.05 if is_spread else 0.1
        for _ in range(runs):
            confidence = draw.beta(8, 1, n)
            wrong = draw.random(n) < 1 - confidence
            audited = np.full(n, 0.1)
            if is_spread:
                audited[:] = [spread.probability(c, 0.1, 0.8, inf) for c in confidence.tolist()]
            inclusion = np.where(confidence < 0.8, 1.0, audited)
            seen = draw.random(n) < inclusion
            inside = []
            for upto in range(n // looks, n + 1, n // looks):
                part = np.flatnonzero(seen[:upto])
                kinds, which = np.unique(inclusion[part], return_inverse=True)
                counts, errors = np.bincount(which), np.bincount(which, weights=wrong[part])
                found = error_escape(
                    Audited(floor / p, int(count), int(bad))
                    for p, count, bad in zip(kinds.tolist(), counts, errors, strict=True)
                )
                inside.append(found.low <= 1 / 9 <= found.high)
            misses += not all(inside)
            assert found.estimate is not None
            estimates.append(found.estimate - float(np.mean(1 - confidence)))
            naive.append(float(wrong[seen].mean()) - 1 / 9)
        standard_error = np.std(estimates) / sqrt(runs)
        assert abs(np.mean(estimates)) < 3 * standard_error + 1e-3
        assert np.mean(naive) > 0.1
        assert misses <= 0.05 * runs


class TestErrorCusum:
    def test_it_is_quiet_while_errors_are_as_they_should_be(self) -> None:
        draw, alarms = np.random.default_rng(3), 0
        for _ in range(200):
            cusum = ErrorCusum(0.02)
            for wrong in draw.random(2000) < 0.02:
                cusum = cusum.after(not wrong)
                if cusum.is_alarm:
                    alarms += 1
                    break
        assert alarms <= 0.05 * 200

    def test_it_is_as_quiet_where_what_is_doubtful_is_drawn_more_often(self) -> None:
        draw, alarms = np.random.default_rng(7), 0
        for _ in range(100):
            cusum = ErrorCusum(0.02)
            # Half of the responses have 0.5 % errors and are audited at 5 %, half have 3.5 % and are at 15 %.
            doubtful = draw.random(2000) < 0.75
            for doubt, chance in zip(doubtful.tolist(), draw.random(2000).tolist(), strict=True):
                error, share = (0.035, 1 / 3) if doubt else (0.005, 1.0)
                cusum = cusum.after(chance > error, share)
                if cusum.is_alarm:
                    alarms += 1
                    break
        assert alarms <= 0.05 * 100

    def test_it_notices_five_times_as_many_within_some_hundred_reviews(self) -> None:
        draw, delays = np.random.default_rng(4), []
        for _ in range(100):
            cusum, n = ErrorCusum(0.02), 0
            for wrong in draw.random(3000) < 0.10:
                cusum, n = cusum.after(not wrong), n + 1
                if cusum.is_alarm:
                    break
            delays.append(n)
        assert np.median(delays) <= 200
        assert max(delays) < 1000

    @given(st.lists(st.tuples(st.booleans(), st.floats(0.01, 1)), max_size=100))
    def test_one_more_error_is_more_evidence(self, reviews: list[tuple[bool, float]]) -> None:
        cusum = ErrorCusum(0.05)
        for acceptable, share in reviews:
            cusum = cusum.after(acceptable, share)
        assert cusum.after(False).evidence > cusum.after(True).evidence
        assert cusum.reviewed == len(reviews)


class TestDrift:
    @given(values, values)
    def test_the_distance_is_that_of_two_samples(
        self, first: list[float], second: list[float]
    ) -> None:
        reference = sorted(first)
        ranks = sorted(rank(reference, each) for each in second)
        expected = ks_2samp(first, second, method="asymp").statistic
        assert kolmogorov_smirnov(ranks, len(reference)) == pytest.approx(expected, abs=1e-9)

    def test_bins_of_equal_mass_give_pearsons_statistic_and_no_infinity(self) -> None:
        draw = np.random.default_rng(5)
        reference = sorted(draw.random(1000))
        other = draw.random(500) ** 2
        ranks = sorted(rank(reference, each) for each in other)
        cuts = [reference[1000 * k // 10 + 1] for k in range(1, 10)]
        table = [
            np.bincount(np.searchsorted(cuts, each, "right"), minlength=10)
            for each in (np.asarray(reference), other)
        ]
        found = binned(ranks, reference, 10)
        assert found.statistic == pytest.approx(chi2_contingency(np.asarray(table)).statistic)
        assert found.degrees == 9
        assert found.stability > 0.25
        assert binned([(1000, 1000)] * 50, reference).stability < 20
        assert binned([(0, 1000)] * 50, [1.0] * 1000) == (0.0, 0, 0.0)

    @pytest.mark.parametrize("degrees", [1, 4, 9, 19])
    @pytest.mark.parametrize("tail", [0.05, 1e-3, 1e-6])
    def test_the_quantile_is_that_of_chi_squared_or_a_little_more(
        self, degrees: int, tail: float
    ) -> None:
        exact = chi2.isf(tail, degrees)
        most = 1.16 if degrees == 1 else 1.06
        assert 0.97 * exact <= chi_squared_quantile(degrees, tail) <= most * exact

    def test_it_is_quiet_while_nothing_changes(self) -> None:
        draw, runs = np.random.default_rng(6), 25
        alarms = sum(
            first_alarm(draw.beta(8, 1, REFERENCE + HORIZON // 2)) is not None for _ in range(runs)
        )
        assert alarms <= 2

    @pytest.mark.parametrize(
        ("after", "within"), [((4.0, 1.0), 150), ((6.0, 1.0), 500), ((8.0, 1.3), 500)]
    )
    def test_it_notices_changes_of_place_and_of_shape(
        self, after: tuple[float, float], within: int
    ) -> None:
        draw, delays = np.random.default_rng(7), []
        for _ in range(15):
            at = first_alarm(np.concatenate([draw.beta(8, 1, 1500), draw.beta(*after, 2000)]))
            assert at is not None
            delays.append(at - 1500)
        assert np.median(delays) <= within

    def test_a_signal_that_never_moves_never_drifts_and_one_that_begins_to_does(self) -> None:
        assert first_alarm(np.ones(3000)) is None
        assert first_alarm(np.concatenate([np.ones(1500), np.linspace(0.9, 1, 200)])) is not None


def first_alarm(stream: np.ndarray) -> int | None:
    monitor = DriftMonitor()
    for at, value in enumerate(stream, 1):
        if monitor.add(float(value)) is not None:
            return at
    return None


class TestCalibration:
    def test_confidence_that_is_true_is_let_be(self) -> None:
        draw, found = np.random.default_rng(8), 0
        for _ in range(200):
            confidence = draw.beta(8, 1, 500)
            labels = draw.random(500) < confidence
            found += (
                miscalibration(list(zip(confidence, map(bool, labels), strict=True))) is not None
            )
        assert found <= 2

    def test_confidence_that_is_too_high_is_noticed_with_its_error(self) -> None:
        draw = np.random.default_rng(9)
        confidence = draw.beta(8, 1, 500)
        labels = draw.random(500) < confidence - 0.15
        found = miscalibration(list(zip(confidence, map(bool, labels), strict=True)))
        assert found is not None
        assert found.error == pytest.approx(0.15, abs=0.05)
        assert found.claimed - found.found == pytest.approx(0.15, abs=0.05)

    def test_few_labels_say_nothing(self) -> None:
        assert miscalibration([(0.99, False)] * 199) is None
        assert miscalibration([(0.99, False)] * 200) is not None


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), max_size=10))
def test_agreement_counts_pairs(answers: list[list[bool]]) -> None:
    pairs = [(a, b) for each in answers for a, b in combinations(each, 2)]
    assert agreement(answers) == (sum(a == b for a, b in pairs), len(pairs))


def alarm_after(
    differ: np.ndarray, shares: np.ndarray | None = None, most: float | None = None
) -> int | None:
    """After how many pairs there is an alarm, None if there is none."""
    monitor = AgreementMonitor(ALPHA, most)
    weights = np.ones(len(differ)) if shares is None else shares
    for at, (one, share) in enumerate(zip(differ.tolist(), weights.tolist(), strict=True), 1):
        if monitor.add(differ=one, share=share) is not None:
            return at
    return None


class TestAgreement:
    @pytest.mark.parametrize("truth", [0.0, 0.03, 0.3, 0.97, 1.0])
    def test_who_differ_as_often_as_before_raise_no_alarm(self, truth: float) -> None:
        draw, runs = np.random.default_rng(11), 60
        alarms = [alarm_after(draw.random(2200) < truth) for _ in range(runs)]
        assert sum(each is not None for each in alarms) <= ALPHA * runs

    def test_reviewers_who_differ_as_often_as_they_may_raise_none_either(self) -> None:
        draw, runs = np.random.default_rng(12), 60
        alarms = [alarm_after(draw.random(2200) < 0.15, most=0.15) for _ in range(runs)]
        assert sum(each is not None for each in alarms) <= ALPHA * runs

    def test_audits_that_become_rarer_are_no_change_of_the_judge(self) -> None:
        draw, runs, alarms, naive = np.random.default_rng(13), 40, 0, 0
        for _ in range(runs):
            is_hard = draw.random(30_000) < 0.2
            wrong = draw.random(30_000) < np.where(is_hard, 0.5, 0.02)
            floor = np.where(np.arange(30_000) < 1500, 0.3, 0.05)
            inclusion = np.where(is_hard, 1.0, floor)
            seen = np.flatnonzero(draw.random(30_000) < inclusion)[:2200]
            alarms += alarm_after(wrong[seen], (floor / inclusion)[seen]) is not None
            naive += alarm_after(wrong[seen]) is not None
        assert alarms <= ALPHA * runs
        assert naive > 4 * ALPHA * runs

    @pytest.mark.parametrize(
        ("before", "after", "within", "most"),
        [(0.02, 0.2, 400, None), (0.1, 0.5, 100, None), (0.05, 0.3, 250, 0.15)],
    )
    def test_who_come_to_differ_are_found_out(
        self, before: float, after: float, within: int, most: float | None
    ) -> None:
        draw, found = np.random.default_rng(14), []
        for _ in range(40):
            differ = draw.random(400 + within) < np.repeat([before, after], [400, within])
            found.append(alarm_after(differ, most=most))
        assert sum(each is not None and each > 400 for each in found) >= 38

    def test_too_little_agreement_is_found_before_there_is_a_reference(self) -> None:
        found = alarm_after(np.random.default_rng(15).random(REFERENCE_PAIRS) < 0.5, most=0.15)
        assert found is not None

    def test_the_evidence_says_what_is_and_what_was(self) -> None:
        monitor = AgreementMonitor(ALPHA)
        for at in range(REFERENCE_PAIRS + 60):
            assert monitor.add(differ=at % 50 == 0) is None
        found = next(found for _ in range(60) if (found := monitor.add(differ=True)))
        assert (found.reference, found.differed) == (REFERENCE_PAIRS, 4)
        assert 10 <= found.differ <= found.n <= 30
        assert 0.02 < found.limit < 0.06
