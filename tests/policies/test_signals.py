"""Signals: the formulas, the kinds of absence, hostile numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.signals import (
    CONSTANT_TOKENS,
    FLOOR,
    Absence,
    SignalName,
    feature,
    log_odds,
    score,
    signals,
    token_signals,
)
from tests.policies.build import exchange, tokens
from validators import TokenLogprob

VECTORS = Path(__file__).parents[1] / "vectors" / "openai_logprobs.json"
LOGPROBS = st.floats(min_value=-50, max_value=0)
WITH_ALTERNATIVES = st.lists(
    st.lists(st.floats(min_value=-50, max_value=0), min_size=2, max_size=5), min_size=1, max_size=40
)


def test_every_signal_follows_its_formula() -> None:
    found = signals(
        exchange(tokens([-0.1, -2.0, -0.3], [[-0.1, -3.0], [-1.0, -2.0], [-0.3, -1.5]]))
    )
    listed = [[-0.1, -3.0], [-1.0, -2.0], [-0.3, -1.5]]
    assert found.absent is None
    assert found.values == pytest.approx(
        {
            "n_tokens": 3,
            "total_logprob": -2.4,
            "mean_logprob": -0.8,
            "min_logprob": -2.0,
            "p10_logprob": -2.0,
            "first_logprob": -0.1,
            "mean_margin": (2.9 + 1.0 + 1.2) / 3,
            "min_margin": 1.0,
            "mean_entropy": fmean(-sum(math.exp(x) * x for x in position) for position in listed),
        }
    )


def test_signal_names_are_exactly_the_declared_ones() -> None:
    assert set(token_signals(tokens([-1.0], [[-1.0, -2.0]])).values) == set(get_args(SignalName))


@pytest.mark.parametrize(("n", "rank"), [(1, 0), (10, 0), (11, 1), (20, 1), (21, 2), (300, 29)])
def test_low_percentile_is_the_nearest_rank(n: int, rank: int) -> None:
    logprobs = [-each / n for each in range(n, 0, -1)]
    assert token_signals(tokens(logprobs)).values["p10_logprob"] == logprobs[rank]


def test_real_openai_choices_give_every_signal() -> None:
    choices = json.loads(VECTORS.read_text())["choices"]
    for choice in choices:
        content = msgspec.convert(choice["logprobs"]["content"], list[TokenLogprob])
        found = signals(exchange(content))
        assert set(found.values) == set(get_args(SignalName))
        assert score(found.values) == pytest.approx(math.exp(content[0].logprob or 0.0))


def test_the_least_certain_choice_speaks_for_the_response() -> None:
    sure, unsure = tokens([-0.1, -0.1]), tokens([-0.5])
    assert signals(exchange(sure, unsure)).values == token_signals(unsure).values


def test_a_choice_without_logprobs_makes_the_response_unknown() -> None:
    assert signals(exchange(tokens([-0.1]), None)).absent is Absence.ABSENT


@pytest.mark.parametrize(
    ("logprobs", "absence"),
    [
        (None, Absence.ABSENT),
        ([], Absence.ABSENT),
        ([None, None], Absence.NULL),
        ([-0.1, None], Absence.PARTIAL),
        ([-0.1, math.nan], Absence.MALFORMED),
        ([-0.1, 0.5], Absence.MALFORMED),
        ([-0.1, math.inf], Absence.MALFORMED),
        ([-math.inf, math.inf], Absence.MALFORMED),
    ],
)
def test_absence_is_told_apart(logprobs: list[float | None] | None, absence: Absence) -> None:
    found = signals(exchange(None if logprobs is None else tokens(logprobs)))
    assert (found.absent, found.values) == (absence, {})


def test_a_response_without_choices_has_no_signals() -> None:
    assert signals(exchange()).absent is Absence.ABSENT


def test_a_long_answer_of_ones_without_alternatives_is_constant() -> None:
    assert token_signals(tokens([0.0] * CONSTANT_TOKENS)).absent is Absence.CONSTANT


def test_ones_whose_alternatives_were_cut_off_by_sampling_are_constant() -> None:
    cut = [[0.0, -math.inf, -9999.0]] * CONSTANT_TOKENS
    assert token_signals(tokens([0.0] * CONSTANT_TOKENS, cut)).absent is Absence.CONSTANT


def test_a_short_certain_answer_is_not_constant() -> None:
    assert token_signals(tokens([0.0] * (CONSTANT_TOKENS - 1))).absent is None


def test_a_long_certain_answer_with_unlikely_alternatives_is_not_constant() -> None:
    listed = [[0.0, -21.0]] * 100
    assert token_signals(tokens([0.0] * 100, listed)).absent is None


def test_one_doubtful_token_makes_a_long_answer_not_constant() -> None:
    assert token_signals(tokens([0.0] * 99 + [-0.01])).absent is None


@pytest.mark.parametrize("unlikely", [-9999.0, -math.inf])
def test_sentinels_for_unlikely_count_as_the_floor(unlikely: float) -> None:
    values = token_signals(tokens([unlikely, 0.0], [[-0.5, unlikely], [0.0, unlikely]])).values
    assert values["min_logprob"] == FLOOR
    assert values["mean_logprob"] == FLOOR / 2
    assert values["min_margin"] == -0.5 - FLOOR
    assert all(math.isfinite(value) for value in values.values())


def test_rounding_above_zero_counts_as_zero() -> None:
    values = token_signals(tokens([1e-7, -1.0])).values
    assert values["first_logprob"] == 0.0
    assert values["total_logprob"] == -1.0


@pytest.mark.parametrize(
    "listed",
    [
        [[-0.1, -2.0], [-0.1]],
        [[-0.1, -2.0], []],
        [[-0.1, -2.0], [-0.1, None]],
        [[-0.1, -2.0], [-0.1, math.nan]],
        [[-0.1, -2.0], [800.0, -0.1]],
    ],
    ids=["one", "none", "null", "nan", "positive"],
)
def test_unusable_alternatives_leave_out_their_signals_alone(
    listed: list[list[float | None]],
) -> None:
    values = token_signals(tokens([-0.1, -0.1], listed)).values
    assert "mean_logprob" in values
    assert not {"mean_margin", "min_margin", "mean_entropy"} & values.keys()


@given(WITH_ALTERNATIVES)
def test_alternatives_may_come_in_any_order_and_number(listed: list[list[float]]) -> None:
    chosen = [position[0] for position in listed]
    values = token_signals(tokens(chosen, listed)).values
    ranked = [sorted(position, reverse=True) for position in listed]
    margins = [best - second for best, second, *_ in ranked]
    assert values["min_margin"] == min(margins)
    assert values["mean_margin"] == pytest.approx(fmean(margins))
    assert values == pytest.approx(token_signals(tokens(chosen, ranked)).values)


@given(st.lists(LOGPROBS, min_size=1, max_size=200))
def test_signals_are_finite_ordered_and_the_score_a_probability(logprobs: list[float]) -> None:
    found = token_signals(tokens(logprobs))
    values = found.values
    if found.absent is Absence.CONSTANT:
        return
    assert all(math.isfinite(value) for value in values.values())
    assert values["min_logprob"] <= values["p10_logprob"] <= 0
    assert values["min_logprob"] <= values["mean_logprob"] + 1e-9
    known = score(values)
    assert known is not None
    assert 0 <= known <= 1


@given(st.lists(st.floats(min_value=0, max_value=1), max_size=5))
def test_check_scores_only_lower_the_score_in_any_order(scores: list[float]) -> None:
    alone = score({"mean_logprob": -0.2})
    known = score({"mean_logprob": -0.2}, scores)
    assert alone is not None
    assert known == min([alone, *scores]) == score({"mean_logprob": -0.2}, reversed(scores))


def test_check_scores_alone_make_no_score() -> None:
    assert score({}, [1.0]) is None


@given(st.floats(min_value=0, max_value=1), st.floats(min_value=0, max_value=1))
def test_log_odds_are_finite_and_monotone(left: float, right: float) -> None:
    low, high = sorted((left, right))
    assert math.isfinite(log_odds(low))
    assert log_odds(low) <= log_odds(high)


@given(st.sampled_from(get_args(SignalName)), st.floats(min_value=0, max_value=1e6))
def test_features_are_finite_for_every_value_a_signal_can_have(name: str, size: float) -> None:
    assert math.isfinite(feature(name, -size if name.endswith("logprob") else size))


@pytest.mark.parametrize(
    ("name", "less", "more"),
    [("mean_logprob", -2.0, -0.1), ("min_margin", 0.1, 2.0), ("mean_entropy", 1.0, 0.1)],
)
def test_features_grow_with_certainty(name: str, less: float, more: float) -> None:
    assert feature(name, less) < feature(name, more)
