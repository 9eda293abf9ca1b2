"""Rubric files: those that come with Holdgate, and what is said of one that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from judges import Rubric, RubricJudge
from judges.verdict import Question
from tests.judges.build import CONFIG, CORRECT, answered, begin, fixed, judge_of

SHIPPED = sorted((CONFIG / "rubrics").glob("*.yaml"))

GOOD = """\
name: kind
description: Is it kind?
criteria:
  - {id: kind, question: Is it kind?}
  - {id: style, question: How is the style?, kind: scale, weight: 2}
examples:
  - {answer: "You are right.", labels: {kind: yes, style: 4}, why: It agrees.}
"""


def rubric_of(text: str) -> Rubric:
    judge = judge_of("rubric", rubric="rubrics/kind.yaml", files={"rubrics/kind.yaml": text})
    assert isinstance(judge, RubricJudge)
    return judge._rubric


def test_the_rubrics_that_are_promised_are_there() -> None:
    names = ["correctness", "groundedness", "instruction_following", "relevance", "safety", "tone"]
    assert [path.stem for path in SHIPPED] == [*names, "tool_call_intent"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_rubric_loads_and_its_examples_show_every_criterion_both_ways(path: Path) -> None:
    rubric = rubric_of(path.read_text())
    assert rubric.name == path.stem
    for question in rubric.questions:
        worth = {question.worth[example.labels[question.id]] for example in rubric.examples}
        assert max(worth) >= 0.75, f"no example shows {question.id} at its best"
        assert min(worth) <= 0.25, f"no example shows {question.id} at its worst"
    scores = [rubric.score(_worth(rubric.questions, example.labels)) for example in rubric.examples]
    assert max(scores) >= 0.9
    assert min(scores) <= 0.25


def _worth(questions: tuple[Question, ...], labels: Mapping[str, str]) -> dict[str, float]:
    return {question.id: question.worth[labels[question.id]] for question in questions}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_rubric_is_asked(path: Path) -> None:
    use = "grounded" if path.stem == "groundedness" else "rubric"
    judge = judge_of(use, rubric="r.yaml", files={"r.yaml": path.read_text()})
    _, (call,) = begin(judge, answered("It is 42."))
    for question in rubric_of(path.read_text()).questions:
        assert question.text.strip() in fixed(call)


def test_examples_are_shown_in_the_form_of_the_exchange_and_the_reply() -> None:
    judge = judge_of("rubric", rubric="rubrics/kind.yaml", files={"rubrics/kind.yaml": GOOD})
    _, (call,) = begin(judge, answered("42"))
    assert '{"request": {}, "answer": {"text": "You are right."}}' in fixed(call)
    assert '{"nonce": "MARK", "kind": "yes", "style": "4", "why": "It agrees."}' in fixed(call)


def test_a_score_is_the_weighted_mean() -> None:
    assert rubric_of(GOOD).score({"kind": 1.0, "style": 0.25}) == pytest.approx(0.5)


def test_where_a_rubric_lies_is_no_part_of_the_digest() -> None:
    one = judge_of("rubric", rubric="a.yaml", files={"a.yaml": GOOD})
    other = judge_of("rubric", rubric="b.yaml", files={"b.yaml": GOOD + "# a remark\n"})
    assert one.digest == other.digest != judge_of("rubric").digest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: kind", "", r"'rubrics/kind.yaml' is wrong at name: Field required"),
        ("kind: scale", "kind: stars", r"wrong at criteria\.1\.kind: Input should be 'yes_no' or 'scale'"),
        ("weight: 2", "wieght: 2", r"wrong at criteria\.1\.wieght: Extra inputs"),
        ("weight: 2", "weight: 0", r"wrong at criteria\.1\.weight: .*greater than 0"),
        ("weight: 2", "good: no", r"criteria\.1: a scale runs from 1, worst, to 5"),
        ("id: style", "id: kind", r"two criteria have the id 'kind'; give each its own"),
        ("id: style", "id: why", r"'why' is a key of every reply"),
        ("style: 4", "style: 6", r"example 1 labels 'style' with '6'; write one of 1, 2, 3, 4, 5"),
        ("style: 4", "stile: 4", r"example 1 must label exactly the criteria kind, style"),
        ("description: Is it kind?", "description: [", r"'rubrics/kind.yaml' is not YAML: .*line 4"),
        ("description: Is it kind?", "description: &a Is it?", r"uses an anchor or alias; write the text out"),
        ("name: kind", "name: kind\nname: other", r"not YAML: .*duplicate key"),
        ("name: kind", "name: kind\n" + "#" * 100_000, r"over 100000 characters; shorten it"),
        ("name: kind", "name: " + "[" * 200 + "]" * 200, r"is not YAML|is wrong at name"),
    ],
)  # fmt: skip
def test_a_rubric_that_is_wrong_says_which_file_what_and_how_to_mend_it(
    old: str, new: str, message: str
) -> None:
    assert old in GOOD
    with pytest.raises(ValidationError, match=message):
        rubric_of(GOOD.replace(old, new, 1))


@pytest.mark.parametrize(
    "text", ["", "just text", "- a\n- b\n", "\0", "%YAML 9\n---\n", '"\\U99999999"']
)
def test_a_file_that_is_no_rubric_at_all_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"rubric file 'rubrics/kind\.yaml'"):
        rubric_of(text)


def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(
        ValidationError, match=r"rubric file 'gone\.yaml' cannot be read: no such file"
    ):
        judge_of("rubric", rubric="gone.yaml", files={})
    with pytest.raises(ValidationError, match="no reader was given; write the rubric in place"):
        judge_of("rubric", rubric="gone.yaml")


def test_a_rubric_in_place_is_checked_like_one_in_a_file() -> None:
    with pytest.raises(ValidationError, match=r"the rubric is wrong at criteria\.0\.question"):
        judge_of("rubric", rubric={**CORRECT, "criteria": [{"id": "correct"}]})
