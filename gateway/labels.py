"""Labels: what people say of responses, reduced to one a decision, and read from files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, NamedTuple

from msgspec.structs import replace
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from gateway.errors import InvalidRequest
from gateway.records import Label, LabelSource, NewLabel

#: How far what the users of an application say is trusted, beside a reviewer's 1.
FEEDBACK_WEIGHT = 0.5

MAX_COMMENT = 10_000
_MAX_LINE = 100_000


class LabelError(ValueError):
    """A file of labels is wrong; a line for each mistake."""


def latest(labels: Iterable[Label]) -> list[Label]:
    """What each labeller last said of each decision, in the order in which it was said."""
    last = {(each.decision_id, each.labeller): each for each in labels}
    return sorted(last.values(), key=lambda each: each.seq)


class Reduced(NamedTuple):
    """One label for a decision, and whether two labellers, and more than say otherwise, agree on it."""

    label: Label
    settled: bool


def reduced(labels: Sequence[Label]) -> Reduced:
    """One label for the n >= 1 labels of a decision.

    What a labeller said last counts, once, and only those of the greatest weight are heard: what applications say changes
    nothing where a reviewer has spoken, and neither takes an error away from a certificate nor adds one. The answer is that of
    the majority; not acceptable if there is none, until one more has spoken. It is the earliest label of those that say so;
    the inclusion is that of the first label whose inclusion is known, since that is a matter of the decision and not of the
    labeller.
    """
    said = latest(labels)
    greatest = max(each.weight for each in said)
    heard = [each for each in said if each.weight == greatest]
    approving = sum(each.acceptable for each in heard)
    acceptable = approving > len(heard) - approving
    behind = [each for each in heard if each.acceptable is acceptable]
    drawn = next((each for each in said if each.inclusion is not None), behind[0])
    one = replace(behind[0], inclusion=drawn.inclusion, inclusion_floor=drawn.inclusion_floor)
    return Reduced(one, len(behind) >= 2 and len(behind) > len(heard) - len(behind))


def by_decision(labels: Iterable[Label]) -> dict[str, list[Label]]:
    """The labels of each decision, in the order of the first label of each."""
    found: dict[str, list[Label]] = defaultdict(list)
    for each in labels:
        found[each.decision_id].append(each)
    return dict(found)


class Feedback(BaseModel):
    """What an application says of a response. `id` is the decision's, or the provider's of the response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=256)]
    acceptable: bool
    comment: Annotated[str, Field(max_length=MAX_COMMENT)] | None = None

    def label(self, decision_id: str, labeller: str, now: datetime) -> NewLabel:
        """The label that this is, of an application with that name."""
        return NewLabel(
            decision_id=decision_id,
            at=now,
            source=LabelSource.FEEDBACK,
            labeller=labeller,
            acceptable=self.acceptable,
            weight=FEEDBACK_WEIGHT,
            comment=self.comment,
        )


def read_feedback(body: bytes) -> Feedback:
    """The feedback in a request body. Raises `InvalidRequest`."""
    try:
        return Feedback.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise InvalidRequest(f"{where}: {first['msg']}", param=where) from error


class Line(BaseModel):
    """One line of a file of labels. `id` is a decision's, or the provider's of its response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=256)]
    acceptable: bool
    labeller: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    inclusion: Annotated[float, Field(gt=0, le=1)] | None = None
    blind: bool = False
    comment: Annotated[str, Field(max_length=MAX_COMMENT)] | None = None
    at: AwareDatetime | None = None


def read_lines(text: str, file: str) -> dict[int, Line]:
    """The labels of a JSONL file by the number of their line, from 1; empty lines are passed over.

    Raises
    ------
    LabelError
        With every mistake, each with its line, or if there is no label at all.
    """
    found: dict[int, Line] = {}
    mistakes = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(line) > _MAX_LINE:
            mistakes.append(f"{file}:{number}: longer than {_MAX_LINE} characters")
            continue
        try:
            found[number] = Line.model_validate_json(line)
        except ValidationError as error:
            mistakes += [
                f"{file}:{number}: {'.'.join(map(str, each['loc'])) or 'the line'}: {each['msg']}"
                for each in error.errors(include_url=False, include_input=False)
            ]
    if not found and not mistakes:
        mistakes = [f"{file}: there is no label in it"]
    if mistakes:
        raise LabelError("\n".join(mistakes))
    return found


def imported(line: Line, decision_id: str, labeller: str, now: datetime) -> NewLabel:
    """The label that a line gives a decision; `labeller` is who is meant where the line names nobody."""
    return NewLabel(
        decision_id=decision_id,
        at=min(line.at or now, now),
        source=LabelSource.IMPORT,
        labeller=line.labeller or labeller,
        acceptable=line.acceptable,
        weight=line.weight,
        inclusion=line.inclusion,
        blind=line.blind,
        comment=line.comment,
    )
