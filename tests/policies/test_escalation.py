"""Thresholds of a cascade: what they promise, by simulation where the truth is known, and what they do in small."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.escalation import Row, fit_threshold, settle, starts, tally

scores = st.none() | st.floats(0, 1)
labelled = st.integers(1, 3).flatmap(
    lambda k: st.lists(
        st.tuples(st.lists(scores, min_size=k, max_size=k), st.booleans()), max_size=120
    )
)


def drawn(chance: random.Random, n: int, *, edge: float) -> tuple[list[Row], list[bool]]:
    """Two judges whose verdicts are wrong with the probability `edge` however sure they are."""
    rows: list[Row] = []
    labels = []
    for _ in range(n):
        row = []
        label = chance.random() < 0.5
        for _ in range(2):
            sure = 0.5 + 0.5 * chance.random()
            row.append(sure if (chance.random() < edge) is not label else 1 - sure)
        rows.append(row)
        labels.append(label)
    return rows, labels


class TestSettle:
    def test_the_first_sure_judge_decides(self) -> None:
        assert settle([0.97, 0.01], 0.95) == (0, True)
        assert settle([0.9, 0.01], 0.95) == (1, False)

    def test_a_judge_is_as_sure_of_a_fail_as_of_a_pass(self) -> None:
        """Though 1 - 0.9 is less than 0.1 in binary fractions."""
        assert settle([0.1], 0.9) == (0, False)
        assert settle([0.9], 0.9) == (0, True)

    def test_a_judge_that_could_not_tell_is_passed_over(self) -> None:
        assert settle([None, 0.99], 0.9) == (1, True)

    def test_nobody_sure_settles_nothing(self) -> None:
        assert settle([0.6, 0.4, None], 0.9) is None


def levels(chance: random.Random, n: int, *, edge: float) -> tuple[list[Row], list[bool]]:
    """The same with scores of five votes: few values, and many answers at each."""
    rows, labels = drawn(chance, n, edge=edge)
    return [[None if s is None else round(5 * s) / 5 for s in row] for row in rows], labels


class TestFit:
    @pytest.mark.parametrize("n", [60, 250, 900])
    @pytest.mark.parametrize("sample", [drawn, levels])
    def test_the_promise_is_broken_in_no_more_than_delta_of_samples(
        self, n: int, sample: Callable[..., tuple[list[Row], list[bool]]]
    ) -> None:
        """At the edge, where the risk is just above the target at every threshold, each certificate breaks the promise."""
        chance, runs, delta = random.Random(n), 300, 0.1
        broken = sum(
            fit_threshold(*sample(chance, n, edge=0.151), target_agreement=0.85, delta=delta)
            is not None
            for _ in range(runs)
        )
        noise = (delta * (1 - delta) / runs) ** 0.5
        assert broken / runs <= delta + 2 * noise

    def test_good_judges_are_believed(self) -> None:
        rows, labels = drawn(random.Random(1), 400, edge=0.02)
        threshold = fit_threshold(rows, labels, target_agreement=0.85, delta=0.1)
        assert threshold is not None
        assert tally(rows, labels, threshold).coverage > 0.9

    def test_where_sureness_says_something_only_the_sure_part_is_decided(self) -> None:
        chance = random.Random(4)
        rows: list[Row] = []
        labels = []
        for _ in range(600):
            score = chance.random()
            rows.append([score])
            labels.append(chance.random() < score)
        threshold = fit_threshold(rows, labels, target_agreement=0.8, delta=0.1)
        assert threshold is not None
        found = tally(rows, labels, threshold)
        # With honest probabilities the risk of deciding above t is (1 - t) / 2 on average: t = 0.6 is the best there is.
        assert 0.6 <= threshold < 0.8
        assert found.outcomes.agreement is not None
        assert found.outcomes.agreement.value >= 0.8

    def test_labels_that_cannot_prove_it_give_nothing(self) -> None:
        rows, labels = drawn(random.Random(2), 400, edge=0.3)
        assert fit_threshold(rows, labels, target_agreement=0.85, delta=0.1) is None
        assert fit_threshold([], [], target_agreement=0.85, delta=0.1) is None
        # Of answers as sure as one another all but one are tested: 0.85 ** 14 is above a tenth, 0.85 ** 15 is not.
        few = [
            fit_threshold([[0.99]] * n, [True] * n, target_agreement=0.85, delta=0.1)
            for n in (15, 16)
        ]
        assert few == [None, 0.989999]

    def test_judges_that_never_tell_are_never_believed(self) -> None:
        rows: list[Row] = [[None, None]] * 300
        assert fit_threshold(rows, [True] * 300, target_agreement=0.5, delta=0.1) is None

    @given(labelled, st.floats(0.5, 0.95), st.floats(0.01, 0.3))
    def test_a_threshold_is_one_that_a_judge_can_reach(
        self, rows: list[tuple[list[float | None], bool]], target: float, delta: float
    ) -> None:
        asked: list[Row] = [row for row, _ in rows]
        labels = [label for _, label in rows]
        threshold = fit_threshold(asked, labels, target_agreement=target, delta=delta)
        if threshold is not None:
            assert 0.5 < threshold <= 1
            assert tally(asked, labels, threshold).coverage > 0

    @given(labelled)
    def test_to_ask_more_of_it_never_lowers_the_threshold(
        self, rows: list[tuple[list[float | None], bool]]
    ) -> None:
        asked: list[Row] = [row for row, _ in rows]
        labels = [label for _, label in rows]
        found = [
            fit_threshold(asked, labels, target_agreement=target, delta=delta) or 2.0
            for target, delta in ((0.6, 0.2), (0.7, 0.2), (0.7, 0.05))
        ]
        assert found == sorted(found)

    @pytest.mark.parametrize(
        ("rows", "labels", "target", "delta", "says"),
        [
            ([[0.5]], [], 0.8, 0.1, "1 rows of scores and 0 labels"),
            ([[1.5]], [True], 0.8, 0.1, r"not in \[0, 1\]"),
            ([[float("nan")]], [True], 0.8, 0.1, r"not in \[0, 1\]"),
            ([[0.5]], [True], 1.0, 0.1, "between 0 and 1"),
            ([[0.5]], [True], 0.8, 0.0, "between 0 and 1"),
        ],
    )
    def test_what_cannot_be_fitted_is_refused(
        self, rows: list[Row], labels: list[bool], target: float, delta: float, says: str
    ) -> None:
        with pytest.raises(ValueError, match=says):
            fit_threshold(rows, labels, target_agreement=target, delta=delta)


@given(st.integers(0, 20_000))
def test_every_start_but_the_first_rests_on_enough(n: int) -> None:
    first, *others = starts(n)
    assert first == n // 2
    assert all(start >= 100 for start in others)


@given(labelled, st.floats(0.5, 1.1))
def test_a_tally_accounts_for_every_answer(
    rows: list[tuple[list[float | None], bool]], threshold: float
) -> None:
    asked: list[Row] = [row for row, _ in rows]
    found = tally(asked, [label for _, label in rows], threshold)
    assert found.n == len(rows)
    assert sum(found.decided) == found.outcomes.n <= found.n
    assert list(found.asked) == sorted(found.asked, reverse=True)
    assert all(
        decided <= reached for decided, reached in zip(found.decided, found.asked, strict=True)
    )
    assert 0 <= found.coverage <= 1
