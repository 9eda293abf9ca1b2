"""Reading what a judge said: exactly one verdict with the nonce, or none; and the score its tokens make."""

from __future__ import annotations

import json
import math
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges import Alternative, Method, ModelReply, ReplyToken, VerdictError
from judges.verdict import Question, read_verdict, weigh
from tests.judges.build import NONCE, tokens, verdict

YES_NO = {"yes": 1.0, "no": 0.0}
SCALE = {str(step): (step - 1) / 4 for step in range(1, 6)}
RIGHT = Question("right", "Is it right?", YES_NO)
GOOD = Question("good", "How good is it?", SCALE)

probabilities = st.floats(0.0001, 0.9999)


def read(text: str, method: Method = Method.VOTES, finish_reason: str | None = "stop") -> float:
    reply = ModelReply(text, finish_reason=finish_reason)
    return read_verdict([reply], [RIGHT], method, NONCE).scores["right"]


def test_the_score_is_the_probability_of_the_label_not_the_label() -> None:
    reply = verdict({"right": "yes"}, sure=0.7)
    assert read_verdict([reply], [RIGHT], Method.LOGPROB, NONCE).scores["right"] == pytest.approx(
        0.7
    )


def test_a_scale_scores_its_expected_value() -> None:
    alternatives = [("4", log(0.5)), ("5", log(0.3)), ("3", log(0.2))]
    assert weigh(alternatives, SCALE) == pytest.approx(0.5 * 0.75 + 0.3 + 0.2 * 0.5)


def test_each_question_is_scored_at_its_own_label() -> None:
    text = json.dumps({"nonce": NONCE, "right": "yes", "good": "4", "why": "yes 5"})
    found = tokens(text, sure=1.0)
    for place, token in enumerate(found):
        if token.token == "4":
            found[place] = ReplyToken(
                "4", log(0.5), [Alternative("4", log(0.5)), Alternative("2", log(0.5))]
            )
    scores = read_verdict([ModelReply(text, found)], [RIGHT, GOOD], Method.LOGPROB, NONCE).scores
    assert scores == {"right": pytest.approx(1.0), "good": pytest.approx(0.5)}


@pytest.mark.parametrize("token", ['"yes', ' "yes', "yes", ":yes", '"Yes"', "y", '":"ye'])
def test_a_label_is_found_in_whatever_token_it_begins(token: str) -> None:
    others = [(token, log(0.6)), ("No", log(0.2)), (' "no', log(0.2))]
    assert weigh(others, YES_NO) == pytest.approx(0.6)


@pytest.mark.parametrize("token", ["yesterday", "maybe", "", '"', "}", "n/a", "yes or no"])
def test_what_is_no_label_counts_for_none(token: str) -> None:
    assert weigh([(token, log(0.5)), ("yes", log(0.3)), ("no", log(0.2))], YES_NO) == pytest.approx(
        0.6
    )


@given(probabilities, probabilities)
def test_a_weighted_score_lies_between_0_and_1(yes: float, no: float) -> None:
    assert 0 <= weigh([("yes", log(yes)), ("no", log(no))], YES_NO) <= 1


@given(st.lists(st.tuples(st.sampled_from(list(SCALE)), probabilities), min_size=1, max_size=20))
def test_a_scale_score_lies_between_the_worth_of_its_labels(found: list[tuple[str, float]]) -> None:
    worth = [SCALE[label] for label, _ in found]
    score = weigh([(label, log(share)) for label, share in found], SCALE)
    assert min(worth) - 1e-9 <= score <= max(worth) + 1e-9


@given(probabilities, probabilities, st.floats(0.01, 0.99))
def test_the_score_grows_with_the_probability_of_yes(
    first: float, second: float, no: float
) -> None:
    low, high = sorted([first, second])
    one, other = (weigh([("yes", log(yes)), ("no", log(no))], YES_NO) for yes in (low, high))
    assert one <= other + 1e-12


@given(probabilities, probabilities, st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
def test_it_does_not_matter_over_which_variants_a_label_is_spread(
    yes: float, no: float, shares: list[float]
) -> None:
    variants = ["yes", "Yes", ' "yes', "YES"]
    total = sum(shares)
    spread = [
        (variant, log(yes * share / total))
        for variant, share in zip(variants, shares, strict=False)
    ]
    whole = weigh([("yes", log(yes)), ("no", log(no))], YES_NO)
    assert weigh([*spread, ("no", log(no))], YES_NO) == pytest.approx(whole)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
def test_what_is_no_log_probability_is_no_score(value: float) -> None:
    with pytest.raises(VerdictError, match="no log-probability"):
        weigh([("yes", value), ("no", log(0.5))], YES_NO)


@pytest.mark.parametrize(
    "found", [[], [("maybe", log(0.9))], [("yes", -math.inf)], [("yes", -9999.0)]]
)
def test_without_a_likely_label_there_is_no_score(found: list[tuple[str, float]]) -> None:
    with pytest.raises(VerdictError, match="none of the likely tokens"):
        weigh(found, YES_NO)


def test_a_logprob_judge_without_logprobs_is_told_what_else_there_is() -> None:
    with pytest.raises(VerdictError, match=r"method: votes.*method: verbalised"):
        read(f'{{"nonce": "{NONCE}", "right": "yes", "why": ""}}', Method.LOGPROB)


def test_tokens_that_do_not_spell_the_reply_are_not_used() -> None:
    text = f'{{"nonce": "{NONCE}", "right": "yes", "why": ""}}'
    reply = ModelReply(text, [ReplyToken("thinking", -0.1), *tokens(text)])
    with pytest.raises(VerdictError, match="do not spell"):
        read_verdict([reply], [RIGHT], Method.LOGPROB, NONCE)


def test_tokens_that_end_before_the_label_are_not_used() -> None:
    text = f'{{"nonce": "{NONCE}", "right": "yes", "why": ""}}'
    with pytest.raises(VerdictError, match="do not spell"):
        read_verdict([ModelReply(text, tokens(text)[:5])], [RIGHT], Method.LOGPROB, NONCE)


def test_a_step_of_a_scale_may_be_written_as_a_number() -> None:
    text = f'{{"nonce": "{NONCE}", "good": 4, "why": ""}}'
    reply = ModelReply(text, tokens(text, 0.9, "2"))
    for method, score in ((Method.VOTES, 0.75), (Method.LOGPROB, 0.9 * 0.75 + 0.1 * 0.25)):
        scores = read_verdict([reply], [GOOD], method, NONCE).scores
        assert scores["good"] == pytest.approx(score)


def test_a_label_without_its_own_log_probability_is_no_verdict() -> None:
    text = f'{{"nonce": "{NONCE}", "right": "yes", "why": ""}}'
    reply = ModelReply(text, [ReplyToken(token.token, None) for token in tokens(text)])
    with pytest.raises(VerdictError, match="no log-probability"):
        read_verdict([reply], [RIGHT], Method.LOGPROB, NONCE)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"nonce": "NONCE", "right": "yes", "why": "w"}', 1.0),
        ('  {"nonce":"NONCE","right":"No","why":"w"}\n', 0.0),
        ('```json\n{"nonce": "NONCE", "right": "yes", "why": "w"}\n```', 1.0),
        ('{"right": "yes", "why": "w", "nonce": "NONCE"}', 1.0),
    ],
    ids=["as asked", "white space and case", "in a code fence", "in another order"],
)
def test_one_object_is_one_verdict(text: str, score: float) -> None:
    assert read(text.replace("NONCE", NONCE)) == score


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The answer is right: yes", "not one JSON object"),
        ('Sure! {"nonce": "NONCE", "right": "yes", "why": "w"}', "not one JSON object"),
        (
            '{"nonce": "NONCE", "right": "yes", "why": "w"} {"nonce": "NONCE", "right": "no", "why": "w"}',
            "not one JSON object",
        ),
        ('[{"nonce": "NONCE", "right": "yes", "why": "w"}]', "not one JSON object"),
        ('{"nonce": "NONCE", "right": "yes", "right": "no", "why": "w"}', "a key twice"),
        ('{"nonce": "NONCE", "right": "yes"}', "exactly the keys"),
        ('{"nonce": "NONCE", "right": "yes", "why": "w", "safe": "yes"}', "exactly the keys"),
        ('{"right": "yes", "why": "w"}', "exactly the keys"),
        ('{"nonce": "fedcba9876543210", "right": "yes", "why": "w"}', "repeat the nonce"),
        ('{"nonce": 123, "right": "yes", "why": "w"}', "repeat the nonce"),
        ('{"nonce": "NONCE", "right": "perhaps", "why": "w"}', "none of yes, no"),
        ('{"nonce": "NONCE", "right": null, "why": "w"}', "none of yes, no"),
        ('{"nonce": "NONCE", "right": true, "why": "w"}', "none of yes, no"),
        ('{"nonce": "NONCE", "right": ["yes"], "why": "w"}', "none of yes, no"),
        ('{"nonce": "NONCE", "right": NaN, "why": "w"}', "number that is none"),
        ('{"nonce": "NONCE", "right": "yes", "why": 7}', "reason is not text"),
        ('{"nonce": "NONCE", "right": "yes", "wh', "not one JSON object"),
        ("", "not one JSON object"),
        ("[" * 15_000, "not one JSON object"),
        ("9" * 30_000, "over 20000 characters"),
    ],
)
def test_anything_else_is_no_verdict(text: str, reason: str) -> None:
    with pytest.raises(VerdictError, match=reason):
        read(text.replace("NONCE", NONCE))


def test_a_verdict_that_was_cut_off_is_none_even_if_it_can_be_read() -> None:
    text = f'{{"nonce": "{NONCE}", "right": "yes", "why": "w"}}'
    with pytest.raises(VerdictError, match="cut off"):
        read(text, finish_reason="length")


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_two_verdicts_are_ever_read_as_one(before: str, behind: str) -> None:
    one = json.dumps({"nonce": NONCE, "right": "yes", "why": "w"})
    other = json.dumps({"nonce": NONCE, "right": "no", "why": "w"})
    with pytest.raises(VerdictError):
        read(before + one + behind + other)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda part: st.lists(part) | st.dictionaries(st.text(), part),
        max_leaves=8,
    )
)
def test_no_other_json_is_a_verdict(document: object) -> None:
    with pytest.raises(VerdictError):
        read(json.dumps(document))


def test_votes_score_their_share_and_one_that_cannot_be_read_spoils_them() -> None:
    replies = [verdict({"right": label}) for label in ("yes", "no", "yes", "yes")]
    assert read_verdict(replies, [RIGHT], Method.VOTES, NONCE).scores["right"] == 0.75
    with pytest.raises(VerdictError):
        read_verdict([*replies, ModelReply("yes")], [RIGHT], Method.VOTES, NONCE)


@given(st.floats(0, 1))
def test_a_stated_probability_is_the_score(stated: float) -> None:
    text = json.dumps({"nonce": NONCE, "right": stated, "why": ""})
    assert read(text, Method.VERBALISED) == stated


@pytest.mark.parametrize("stated", ["1.5", "-0.1", "true", '"0.9"', "1e999", "null"])
def test_a_stated_probability_is_a_number_from_0_to_1(stated: str) -> None:
    with pytest.raises(VerdictError):
        read(f'{{"nonce": "{NONCE}", "right": {stated}, "why": ""}}', Method.VERBALISED)


@given(st.text())
def test_the_reason_is_kept_up_to_a_bound(why: str) -> None:
    text = json.dumps({"nonce": NONCE, "right": "yes", "why": why})
    read_why = read_verdict([ModelReply(text)], [RIGHT], Method.VOTES, NONCE).why
    assert read_why == why[:1000]


def test_log_probabilities_just_above_zero_are_rounding() -> None:
    assert weigh([("yes", 1e-6), ("no", log(1e-9))], YES_NO) == pytest.approx(1.0)
