"""Named criteria, each a closed question; the workhorse among the judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from judges.asking import Asking, Inquiry, together
from judges.base import Dialogue
from judges.context import ContextPart, answer_parts, request_parts
from judges.fence import as_data
from judges.verdict import NONCE, WHY, Question, Verdict
from validators import JSON, Choice, Exchange, Finding, Opinion

_MAX_CHARS = 100_000
_MAX_DEPTH = 20

Text = Annotated[str, Field(min_length=1, max_length=4_000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class Criterion(_Part):
    """A closed question about the answer.

    `kind: scale` is answered 1 (worst) to 5 (best), `yes_no` by yes or no, of which `good` says which is better. `weight` is
    its share in the score; a `veto` criterion is also an upper bound of the score.
    """

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    question: Text
    kind: Literal["yes_no", "scale"] = "yes_no"
    weight: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    veto: bool = False
    good: Literal["yes", "no"] = "yes"

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        if self.id in (NONCE, WHY):
            raise ValueError(f"{self.id!r} is a key of every reply; give the criterion another id")
        if self.kind == "scale" and "good" in self.model_fields_set:
            raise ValueError(
                "a scale runs from 1, worst, to 5, best; leave good out and ask accordingly"
            )
        return self

    def as_question(self) -> Question:
        """The question, its labels and what each is worth."""
        if self.kind == "scale":
            return Question(
                self.id, self.question, {str(step): (step - 1) / 4 for step in range(1, 6)}
            )
        return Question(
            self.id, self.question, {label: float(label == self.good) for label in ("yes", "no")}
        )


class Example(_Part):
    """An exchange and the labels it deserves: `request` as far as it matters, `answer`, `labels` by criterion, and `why`."""

    request: dict[ContextPart, Text] = Field(default_factory=dict)
    answer: Text
    labels: dict[str, str]
    why: Text


class Rubric(_Part):
    """What an answer is judged by: criteria, and examples that show how they are meant.

    `context` lists the parts of the request that the judge sees beside the answer.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
    description: Text
    version: Annotated[int, Field(ge=1)] = 1
    context: tuple[ContextPart, ...] = (ContextPart.SYSTEM, ContextPart.QUESTION)
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1, max_length=12)]
    examples: Annotated[tuple[Example, ...], Field(max_length=16)] = ()

    @model_validator(mode="after")
    def _examples_fit(self) -> Self:
        questions = self.questions
        ids = [question.id for question in questions]
        if twice := sorted({each for each in ids if ids.count(each) > 1}):
            raise ValueError(f"two criteria have the id {twice[0]!r}; give each its own")
        for number, example in enumerate(self.examples, start=1):
            if set(example.labels) != set(ids):
                raise ValueError(
                    f"example {number} must label exactly the criteria {', '.join(ids)}"
                )
            for question in questions:
                if (label := example.labels[question.id]) not in question.worth:
                    raise ValueError(
                        f"example {number} labels {question.id!r} with {label!r}; "
                        f"write one of {', '.join(question.worth)}"
                    )
        return self

    @property
    def questions(self) -> tuple[Question, ...]:
        """The criteria as questions, in order."""
        return tuple(criterion.as_question() for criterion in self.criteria)

    @property
    def task(self) -> str:
        """The description and the examples, as a judge is told them."""
        lines = [self.description.strip()]
        for example in self.examples:
            reply: dict[str, JSON] = {
                NONCE: "MARK",
                **{each.id: example.labels[each.id] for each in self.criteria},
                WHY: example.why.strip(),
            }
            shown: dict[str, JSON] = {
                "request": {part.value: text for part, text in example.request.items()},
                "answer": {"text": example.answer},
            }
            lines.append(f"Example:\n{as_data(shown)}\n{as_data(reply)}")
        return "\n\n".join(lines)

    def score(self, scores: Mapping[str, float]) -> float:
        """The mean of the criteria's scores by weight, no higher than that of any veto criterion; all in [0, 1]."""
        total = sum(criterion.weight for criterion in self.criteria)
        mean = sum(each.weight * scores[each.id] for each in self.criteria) / total
        return min([1.0, mean, *(scores[each.id] for each in self.criteria if each.veto)])


def read_rubric(rubric: dict[str, object] | str, info: ValidationInfo) -> Rubric:
    """The rubric that a policy gives in place, or as the path of a YAML file.

    Raises
    ------
    ValueError
        If the file cannot be read, is no YAML or is no rubric; the message names file, key and mend.
    """
    if not isinstance(rubric, str):
        return _rubric(rubric, "the rubric")
    where = f"rubric file {rubric!r}"
    read = (info.context or {}).get("read")
    if read is None:
        raise ValueError(
            f"{where} cannot be read here: no reader was given; write the rubric in place"
        )
    try:
        text: str = read(rubric)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from error
    if len(text) > _MAX_CHARS:
        raise ValueError(f"{where} is over {_MAX_CHARS} characters; shorten it")
    return _rubric(_parsed(text, where), where)


def _parsed(text: str, where: str) -> object:
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = _MAX_DEPTH
    yaml.composer.warn_double_anchors = False
    try:
        anchored = any(getattr(event, "anchor", None) for event in yaml.parse(text))
        document: object = None if anchored else yaml.load(text)
    except (YAMLError, ValueError, OverflowError, AssertionError) as error:
        # The parser leaks the last three for escapes beyond Unicode and for directives.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where} is not YAML: {reason}") from error
    if anchored:
        raise ValueError(f"{where} uses an anchor or alias; write the text out")
    return document


def _rubric(document: object, where: str) -> Rubric:
    try:
        return Rubric.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'as a whole'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()[:5]
        )
        raise ValueError(f"{where} is wrong at {problems}") from error


class RubricJudge(Asking):
    """Asks the questions of a rubric, all of them about each answer in one call."""

    use: Literal["rubric"]
    rubric: dict[str, object] | str

    _rubric: Rubric = PrivateAttr()

    @model_validator(mode="after")
    def _load(self, info: ValidationInfo) -> Self:
        self._rubric = read_rubric(self.rubric, info)
        self._digest = self.digest_with(
            self._prompt(), self._rubric.model_dump(mode="json", exclude={"examples"})
        )
        return self

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        """Ask about every answer side by side; the score is that of the worst."""
        if refused := self.refused(exchange):
            return refused
        inquiries = [self._inquiry(exchange, choice, nonce) for choice in exchange.choices]
        verdicts, cost_usd = yield from together(inquiries)
        scores = [self._rubric.score(verdict.scores) for verdict in verdicts]
        worst = scores.index(min(scores))
        opinion = Opinion(
            self.method, self.models, verdicts[worst].scores, rationale=verdicts[worst].why
        )
        findings = [
            finding
            for choice, verdict, score in zip(exchange.choices, verdicts, scores, strict=True)
            if score < self.pass_at
            for finding in self._findings(choice, verdict)
        ]
        return self.result(scores[worst], findings, opinion, cost_usd)

    def _inquiry(self, exchange: Exchange, choice: Choice, nonce: str) -> Inquiry:
        document: dict[str, JSON] = {
            "request": request_parts(exchange, self._rubric.context),
            "answer": answer_parts(choice),
        }
        return self.inquiry(self._prompt(), self._rubric.questions, document, nonce)

    def _prompt(self) -> str:
        return self.prompt(self._rubric.task, self._rubric.questions)

    def _findings(self, choice: Choice, verdict: Verdict) -> Sequence[Finding]:
        return [
            Finding(
                choice.path,
                f"{criterion.id} of {self._rubric.name} scores {score:.2f}: {criterion.question.strip()}",
                rule=criterion.id,
            )
            for criterion in self._rubric.criteria
            if (score := verdict.scores[criterion.id]) < self.pass_at
        ]
