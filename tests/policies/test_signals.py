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
from msgspec.structs import replace

from policies.signals import (
    ALWAYS,
    CONSTANT_TOKENS,
    FLOOR,
    MAX_FIELDS,
    WINDOW_TOKENS,
    Absence,
    SignalName,
    feature,
    field_signals,
    log_odds,
    score,
    signals,
    token_signals,
)
from tests.policies.build import exchange, tokens
from validators import Choice, Exchange, Passage, TokenLogprob, ToolCall, TopLogprob

VECTORS = Path(__file__).parents[1] / "vectors" / "openai_logprobs.json"
LOGPROBS = st.floats(min_value=-50, max_value=0)
WITH_ALTERNATIVES = st.lists(
    st.lists(st.floats(min_value=-50, max_value=0), min_size=2, max_size=5), min_size=1, max_size=40
)


def test_every_signal_follows_its_formula() -> None:
    listed = [[-0.1, -3.0], [-1.0, -2.0], [-0.3, -1.5]]
    found = token_signals(tokens([-0.1, -2.0, -0.3], listed), answer=[0, 2])
    assert found.absent is None
    assert found.values == pytest.approx(
        {
            "n_tokens": 3,
            "total_logprob": -2.4,
            "mean_logprob": -0.8,
            "min_logprob": -2.0,
            "p10_logprob": -2.0,
            "window_logprob": -0.8,
            "first_logprob": -0.1,
            "answer_logprob": -0.4,
            "unsure_tokens": 2,
            "mean_margin": (2.9 + 1.0 + 1.2) / 3,
            "min_margin": 1.0,
            "answer_margin": 1.2,
            "unlisted_mass": fmean(1 - sum(math.exp(x) for x in position) for position in listed),
            "mean_entropy": fmean(-sum(math.exp(x) * x for x in position) for position in listed),
        }
    )


def test_signal_names_are_exactly_the_declared_ones() -> None:
    found = token_signals(tokens([-1.0], [[-1.0, -2.0]]), answer=[0])
    assert set(found.values) == set(get_args(SignalName))


@given(st.lists(LOGPROBS, min_size=1, max_size=CONSTANT_TOKENS - 1))
def test_worst_window_is_the_lowest_mean_of_eight_in_a_row(logprobs: list[float]) -> None:
    values = token_signals(tokens(logprobs)).values
    starts = range(max(1, len(logprobs) - WINDOW_TOKENS + 1))
    means = [fmean(logprobs[start : start + WINDOW_TOKENS]) for start in starts]
    assert values["window_logprob"] == pytest.approx(min(means), abs=1e-9)
    assert values["window_logprob"] <= 0.0


def test_a_phrase_of_doubt_is_a_worse_window_than_as_many_doubts_far_apart() -> None:
    together = [0.0] * 40 + [-1.0] * 8 + [0.0] * 40
    apart = ([-1.0] + [0.0] * 10) * 8
    assert token_signals(tokens(together)).values["window_logprob"] == -1.0
    assert token_signals(tokens(apart)).values["window_logprob"] == -0.125


@pytest.mark.parametrize(
    ("probability", "unsure"), [(0.89, 1), (0.91, 0)], ids=["below 0.9", "above"]
)
def test_unsure_tokens_are_those_below_nine_in_ten(probability: float, unsure: int) -> None:
    found = token_signals(tokens([0.0, math.log(probability), -1e-9]))
    assert found.values["unsure_tokens"] == unsure


def test_mass_outside_the_list_is_what_its_probabilities_leave() -> None:
    listed = [[math.log(0.5), math.log(0.2)], [math.log(0.9), -math.inf]]
    values = token_signals(tokens([-0.1, -0.1], listed)).values
    assert values["unlisted_mass"] == pytest.approx((0.3 + 0.1) / 2)


def test_rounded_probabilities_that_sum_to_more_than_one_leave_no_mass() -> None:
    assert token_signals(tokens([0.0], [[0.0, -9.0]])).values["unlisted_mass"] == 0.0


def test_without_an_answer_only_its_signals_are_missing() -> None:
    found = token_signals(tokens([-1.0], [[-1.0, -2.0]]))
    assert set(get_args(SignalName)) - set(found.values) == {"answer_logprob", "answer_margin"}


def test_tokens_alone_give_what_every_response_has() -> None:
    assert token_signals(tokens([-1.0])).values.keys() == ALWAYS


@pytest.mark.parametrize(("n", "rank"), [(1, 0), (10, 0), (11, 1), (20, 1), (21, 2), (300, 29)])
def test_low_percentile_is_the_nearest_rank(n: int, rank: int) -> None:
    logprobs = [-each / n for each in range(n, 0, -1)]
    assert token_signals(tokens(logprobs)).values["p10_logprob"] == logprobs[rank]


def test_real_openai_choices_give_every_signal() -> None:
    choices = json.loads(VECTORS.read_text())["choices"]
    for choice in choices:
        raw = json.dumps(choice["logprobs"]["content"]).encode()
        content = msgspec.json.decode(raw, type=list[TokenLogprob])
        text = Passage("choices[0].message.content", choice["message"]["content"])
        found = signals(Exchange("chat", {}, (Choice("choices[0]", (text,), logprobs=content),)))
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
    assert not {"mean_margin", "min_margin", "mean_entropy", "unlisted_mass"} & values.keys()


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
    assert values["min_logprob"] - 1e-9 <= values["window_logprob"] <= 0
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
    [
        ("mean_logprob", -2.0, -0.1),
        ("window_logprob", -2.0, -0.1),
        ("answer_logprob", -2.0, -0.1),
        ("min_margin", 0.1, 2.0),
        ("answer_margin", 0.1, 2.0),
        ("mean_entropy", 1.0, 0.1),
        ("unlisted_mass", 0.1, 0.0),
        ("unsure_tokens", 3.0, 0.0),
    ],
)
def test_features_grow_with_certainty(name: str, less: float, more: float) -> None:
    assert feature(name, less) < feature(name, more)


# ------------------------------------------------------------------------------------------------------- the answer


def spelt(*pieces: str | tuple[str, float | None]) -> list[TokenLogprob]:
    """Tokens with these texts; those without a log-probability of their own are certain."""
    told = [each if isinstance(each, tuple) else (each, 0.0) for each in pieces]
    return [TokenLogprob(logprob, text) for text, logprob in told]


def said(*pieces: str | tuple[str, float | None], path: str = "choices[0]") -> Choice:
    """A choice whose content is what these tokens say."""
    written = spelt(*pieces)
    content = Passage(f"{path}.message.content", "".join(token.token for token in written))
    return Choice(path, (content,), logprobs=written)


def of(*choices: Choice) -> Exchange:
    return Exchange("chat", {}, choices)


ORDER = ('{"', ("sku", -3.0), '":"', ("GA", -0.5), ("67", -0.25), '","qty":', ("4", -1.0), "}")


def test_scaffold_does_not_count_towards_the_answer() -> None:
    values = signals(of(said(*ORDER))).values
    assert values["answer_logprob"] == pytest.approx(-1.75)
    assert values["total_logprob"] == pytest.approx(-4.75)


def test_least_certain_choice_gives_the_signals_of_its_own_answer() -> None:
    sure, unsure = said("Answer: ", ("A", -0.1)), said("Answer: ", ("B", -2.0))
    assert signals(of(sure, unsure)).values["answer_logprob"] == -2.0


def test_text_that_the_tokens_do_not_add_up_to_has_no_answer_signals() -> None:
    choice = Choice("choices[0]", (Passage("p", "Answer: C"),), logprobs=spelt("Answer: ", "B"))
    values = signals(of(choice)).values
    assert "mean_logprob" in values
    assert not {"answer_logprob", "answer_margin"} & values.keys()


# ------------------------------------------------------------------------------------------------------- the fields


def test_fields_come_with_the_probability_of_the_tokens_that_wrote_their_value() -> None:
    qty, sku = field_signals(of(said(*ORDER)))
    assert qty.path == "choices[0].message.content#/qty"
    assert qty.token_probability == pytest.approx(math.exp(-1))
    assert qty.n_tokens == 1
    assert sku.path == "choices[0].message.content#/sku"
    assert sku.token_probability == pytest.approx(math.exp(-0.75))
    assert sku.least_probability == pytest.approx(math.exp(-0.5))
    assert sku.n_tokens == 2


def test_fields_of_every_choice_and_tool_call_are_told_apart() -> None:
    arguments = Passage("choices[1].message.tool_calls[0].function.arguments", '{"amount": 9}')
    call = Choice(
        "choices[1]",
        tool_calls=(ToolCall("pay", arguments),),
        logprobs=spelt("<tool_call>", '{"amount": ', ("9", -2.0), "}", "</tool_call>"),
    )
    found = field_signals(of(said('{"a": ', ("1", -1.0), "}"), call))
    assert [each.path for each in found] == [
        "choices[1].message.tool_calls[0].function.arguments#/amount",
        "choices[0].message.content#/a",
    ]


def test_fields_are_found_in_a_code_fence() -> None:
    (field,) = field_signals(of(said("Here:\n```json\n", '{"a": ', ("1", -1.0), "}\n", "```")))
    assert field.path == "choices[0].message.content#/a"
    assert field.token_probability == pytest.approx(math.exp(-1))


def test_only_so_many_fields_are_told_and_the_least_likely_first() -> None:
    pieces = [("1" if n % 2 else ",", -float(n) if n % 2 else 0.0) for n in range(1, 200)]
    found = field_signals(of(said("[", *pieces, "]")))
    assert len(found) == MAX_FIELDS
    assert found[0].path == "choices[0].message.content#/99"
    probabilities = [each.token_probability for each in found]
    assert probabilities == sorted(probabilities)


@pytest.mark.parametrize("logprob", [None, math.nan, 0.5, math.inf])
def test_a_field_with_an_unusable_token_is_left_out_alone(logprob: float | None) -> None:
    (field,) = field_signals(of(said('{"a": ', ("1", logprob), ', "b": ', ("2", -1.0), "}")))
    assert field.path.endswith("#/b")


def test_impossible_tokens_have_probability_nought() -> None:
    (field,) = field_signals(of(said('{"a": ', ("1", -math.inf), "}")))
    assert (field.token_probability, field.least_probability) == (0.0, 0.0)


def test_a_provider_that_is_always_certain_says_nothing_of_fields() -> None:
    long_one = said("[", *["1", ","] * CONSTANT_TOKENS, "1", "]")
    assert signals(of(long_one)).absent is Absence.CONSTANT
    assert field_signals(of(long_one)) == ()


@pytest.mark.parametrize(
    "choice",
    [
        Choice("c", (Passage("c", '{"a": 1}'),)),
        Choice("c", (Passage("c", '{"a": 1}'),), logprobs=[]),
        Choice("c", (Passage("c", '{"a": 1}'),), logprobs=spelt("something else")),
        said("no", " JSON"),
        said('{"a": '),
        said("{", "}"),
    ],
    ids=["absent", "none", "other text", "text", "cut off", "empty"],
)
def test_there_are_no_fields_where_there_is_nothing_to_tell(choice: Choice) -> None:
    assert field_signals(of(choice)) == ()


# ------------------------------------------------------------------------------------------------- whatever comes

NUMBERS = st.none() | st.floats() | st.sampled_from([0.0, -0.1, -9999.0])
TEXTS = st.sampled_from(
    ['{"a": ', "1", "[", "]", "}", "é", "\ufffd", "\\xc3", "", " ", "```json\n", "B)"]
)
RAWS = st.sampled_from([b"null", b"[195]", b"[169]", b"[999]", b'"x"', b"[]"])
TOKENS = st.builds(
    TokenLogprob,
    NUMBERS,
    TEXTS | st.text(max_size=3),
    st.none() | st.lists(st.builds(TopLogprob, NUMBERS), max_size=3),
    st.builds(msgspec.Raw, RAWS),
)
PASSAGES = st.builds(Passage, st.just("p"), st.lists(TEXTS | st.text(max_size=3)).map("".join))
CHOICES = st.builds(
    Choice,
    st.just("c"),
    texts=st.lists(PASSAGES, max_size=2).map(tuple),
    refusals=st.lists(PASSAGES, max_size=1).map(tuple),
    tool_calls=st.lists(st.builds(ToolCall, st.just("f"), PASSAGES), max_size=2).map(tuple),
    logprobs=st.none() | st.lists(TOKENS, max_size=12),
)


@given(st.lists(CHOICES, max_size=3), st.booleans())
def test_whatever_a_provider_sends_gives_numbers_or_says_why_not(
    choices: list[Choice], repeats_itself: bool
) -> None:
    if repeats_itself:
        choices = [
            replace(each, texts=(Passage("p", "".join(one.token for one in each.logprobs or ())),))
            for each in choices
        ]
    found = signals(of(*choices))
    assert (found.absent is None) == bool(found.values)
    assert set(found.values) <= set(get_args(SignalName))
    assert all(math.isfinite(feature(name, value)) for name, value in found.values.items())
    for field in field_signals(of(*choices)):
        assert 0.0 <= field.token_probability <= field.least_probability <= 1.0
        assert field.n_tokens >= 1
