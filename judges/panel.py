"""Several judges asked side by side, and a rule that makes one result of theirs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, PrivateAttr, model_validator

from judges.asking import Probability, sha256
from judges.base import CallsFailed, Dialogue, Judge, ModelCall, ModelReply, VerdictError
from judges.comparison import Comparison
from judges.consistency import Consistency
from judges.grounded import Grounded
from judges.rubric import RubricJudge
from validators import MAX_FINDINGS, CheckResult, Exchange, Opinion, Outcome

#: A judge that asks by itself, and so can be a member of another.
Member = Annotated[Comparison | Consistency | Grounded | RubricJudge, Field(discriminator="use")]
Members = Annotated[tuple[Member, ...], Field(min_length=2, max_length=9)]

_AGREEMENT = "agreement"


def check_members(judges: Sequence[Judge]) -> None:
    """Refuse members that share an id, or say what is done about a result that is only their judge's.

    Raises
    ------
    ValueError
        Naming the member and the mend.
    """
    ids = [judge.id for judge in judges]
    if twice := sorted({each for each in ids if ids.count(each) > 1}):
        raise ValueError(f"two judges have the id {twice[0]!r}; give each its own")
    for judge in judges:
        if own := sorted({"on_fail", "on_error"} & judge.model_fields_set):
            raise ValueError(
                f"{own[0]} of the judge {judge.id!r} would do nothing; write it one level up"
            )


class Speaker:
    """A member's dialogue as it goes: the `calls` it waits for, then its `result`, or the `error` that ended it."""

    def __init__(self, judge: Judge, exchange: Exchange, nonce: str) -> None:
        self.id = judge.id
        self.calls: tuple[ModelCall, ...] = ()
        self.result: CheckResult | None = None
        self.error: Exception | None = None
        self._dialogue = judge.ask(exchange, nonce)
        self._advance(None)

    def answer(self, outcomes: Sequence[ModelReply | Exception]) -> None:
        """Take what came of the calls; one that failed ends the dialogue."""
        self.calls = ()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                self.error = outcome
                self._dialogue.close()
                return
        self._advance(tuple(each for each in outcomes if isinstance(each, ModelReply)))

    def _advance(self, replies: tuple[ModelReply, ...] | None) -> None:
        try:
            self.calls = next(self._dialogue) if replies is None else self._dialogue.send(replies)
        except StopIteration as ended:
            self.result = ended.value
        except VerdictError as error:
            self.error = error


class _View(NamedTuple):
    """A member's score, and whether it passes; of one that has said nothing yet, the best or worst it could say."""

    id: str
    score: float
    passes: bool


class Panel(Judge):
    """Makes one result of its members'.

    By `rule` it passes if all members pass (`unanimous`), if more than half do (`majority`), or if the mean of their scores by
    `weights` is at least `pass_at` (`weighted`). The score is the lowest, the median (lower of the two in the middle) or the weighted mean. A member that could not tell
    counts as what it might have said at worst and at best: if that makes a difference, the panel cannot tell either.
    """

    use: Literal["panel"]
    rule: Literal["unanimous", "majority", "weighted"] = "unanimous"
    judges: Members
    weights: dict[str, Annotated[float, Field(gt=0, le=1_000)]] = Field(default_factory=dict)
    pass_at: Probability = 0.5

    _digest: str = PrivateAttr("")

    @model_validator(mode="after")
    def _load(self) -> Self:
        check_members(self.judges)
        ids = [judge.id for judge in self.judges]
        if _AGREEMENT in ids:
            raise ValueError(f"{_AGREEMENT!r} names what the panel says of itself; take another id")
        if self.rule == "weighted" and set(self.weights) != set(ids):
            raise ValueError(f"rule: weighted needs a weight for each of {', '.join(ids)}")
        for key in ("weights", "pass_at"):
            if self.rule != "weighted" and key in self.model_fields_set:
                raise ValueError(f"{key} is for rule: weighted; leave it out or change the rule")
        members = {judge.id: [judge.digest, judge.pass_at] for judge in self.judges}
        self._digest = sha256("panel", self.rule, self.weights, members)
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The members' models, each once."""
        return tuple(dict.fromkeys(chain.from_iterable(each.models for each in self.judges)))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the rule and of the members, each with where it passes."""
        return self._digest

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        """Ask all members side by side until the outcome is settled, whatever is still to come.

        Raises
        ------
        Exception
            What went wrong with the first member that could not tell, if the panel then cannot tell either.
        """
        speakers = [Speaker(judge, exchange, nonce) for judge in self.judges]
        cost_usd = 0.0
        while (passes := self._settled(speakers)) is None:
            calls = tuple(call for speaker in speakers for call in speaker.calls)
            if not calls:
                raise _first_error(speakers)
            outcomes: Sequence[ModelReply | Exception]
            try:
                outcomes = yield calls
            except CallsFailed as failed:
                outcomes = failed.outcomes
            cost_usd += sum(each.cost_usd for each in outcomes if isinstance(each, ModelReply))
            done = 0
            for speaker in speakers:
                if speaker.calls:
                    count = len(speaker.calls)
                    speaker.answer(outcomes[done : done + count])
                    done += count
        return self._result(speakers, passes, cost_usd)

    def _settled(self, speakers: Sequence[Speaker]) -> bool | None:
        """Whether it passes, None while that depends on what a member has not said."""
        worst, best = (
            self._ruled([_view(each, unknown) for each in speakers])[1] for unknown in (0.0, 1.0)
        )
        return worst if worst is best else None

    def _ruled(self, views: Sequence[_View]) -> tuple[float, bool]:
        scores = [view.score for view in views]
        match self.rule:
            case "unanimous":
                return min(scores), all(view.passes for view in views)
            case "majority":
                passing = sum(view.passes for view in views)
                return statistics.median_low(scores), 2 * passing > len(views)
            case _:
                total = math.fsum(self.weights[view.id] for view in views)
                mean = math.fsum(self.weights[view.id] * view.score for view in views) / total
                mean = min(mean, 1.0)
                return mean, mean >= self.pass_at

    def _result(self, speakers: Sequence[Speaker], passes: bool, cost_usd: float) -> CheckResult:
        said = {each.id: each.result for each in speakers if each.result is not None}
        known = [_view(each, 0.0) for each in speakers if each.id in said]
        score = self._ruled(known)[0]
        opinions = [each.opinion for each in said.values() if each.opinion]
        findings = (
            finding
            for each in said.values()
            if each.outcome is Outcome.FAIL
            for finding in each.findings
        )
        parts = {view.id: view.score for view in known}
        spread = max(parts.values()) - min(parts.values())
        least = min(said.values(), key=lambda each: each.score or 0.0)
        opinion = Opinion(
            "+".join(dict.fromkeys(each.method for each in opinions)),
            tuple(dict.fromkeys(chain.from_iterable(each.models for each in opinions))),
            {**parts, _AGREEMENT: 1.0 - spread},
            rationale=least.opinion.rationale if least.opinion else "",
        )
        return CheckResult(
            self.id,
            Outcome.PASS if passes else Outcome.FAIL,
            score=score,
            findings=() if passes else tuple(dict.fromkeys(findings))[:MAX_FINDINGS],
            cost_usd=cost_usd,
            opinion=opinion if opinions else None,
        )


def _view(speaker: Speaker, unknown: float) -> _View:
    result = speaker.result
    if result is None or result.score is None:
        return _View(speaker.id, unknown, bool(unknown))
    return _View(speaker.id, result.score, result.outcome is Outcome.PASS)


def _first_error(speakers: Sequence[Speaker]) -> Exception:
    name, error = next((each.id, each.error) for each in speakers if each.error is not None)
    error.add_note(f"in the judge {name}")
    return error
