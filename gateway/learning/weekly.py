"""What went wrong in a time: mistakes by category and by what they are about, and what could be done about each kind."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec

from gateway.learning.picking import words_of
from gateway.learning.samples import Outcome, Sample
from gateway.learning.topics import MOST_GROUPED, groups
from policies import Action, Policy

_CATEGORY_CHARS = 60
_EXAMPLES = 3
_ENOUGH_CORRECTED = 5

#: The embedding of each of some texts.
Embed: TypeAlias = Callable[[Sequence[str]], Awaitable[Sequence[Sequence[float]]]]

#: A lever is suggested for what holds of so many of a pattern's mistakes.
_MOSTLY = 0.5


class Mistake(msgspec.Struct, frozen=True):
    """A response that people did not accept. `words` are what was asked and answered, None where the policy does not show it."""

    decision_id: str
    policy: str
    category: str
    outcome: Outcome
    action: Action
    confidence: float | None
    failed: tuple[str, ...]
    judges_passed: tuple[str, ...]
    words: tuple[str, str] | None
    comment: str | None

    @property
    def text(self) -> str:
        """What was asked and answered."""
        return "\n".join(self.words or ())

    @property
    def went_out(self) -> bool:
        """Whether whoever asked got it without anybody's leave."""
        return self.action in (Action.RETURN, Action.FLAG)


class Pattern(msgspec.Struct, frozen=True):
    """Mistakes of one category that are alike; `terms` tell what they are about, and are empty where content is not shown."""

    category: str
    terms: tuple[str, ...]
    mistakes: tuple[Mistake, ...]
    levers: tuple[str, ...]

    @property
    def examples(self) -> Sequence[Mistake]:
        """The most typical ones."""
        return self.mistakes[:_EXAMPLES]


@dataclass(slots=True)
class Counts:
    """How many responses were judged in a time, and what came of it."""

    judged: int = 0
    corrected: int = 0
    rejected: int = 0
    went_out: int = 0
    disputed: int = 0

    @property
    def mistakes(self) -> int:
        """How many were not accepted."""
        return self.corrected + self.rejected

    @property
    def share(self) -> float | None:
        """The share of the judged that were not accepted; not an estimate for all responses: who is judged is not drawn."""
        return self.mistakes / self.judged if self.judged else None


class Weekly(msgspec.Struct, frozen=True):
    """The figures of a time, and of as long a time before it; the patterns, the greatest first.

    `embedded_by` names the model by whose embeddings texts were grouped; None: by their words.
    """

    since: datetime
    until: datetime
    now: Counts
    before: Counts
    policies: Mapping[str, Counts] = msgspec.field(default_factory=dict)
    categories: Mapping[str, Counts] = msgspec.field(default_factory=dict)
    patterns: Sequence[Pattern] = ()
    not_grouped: int = 0
    embedded_by: str | None = None


async def weekly(
    found: AsyncIterator[Sample],
    policies: Mapping[str, Policy],
    *,
    since: datetime,
    until: datetime,
    embedding: tuple[str, Embed] | None = None,
) -> Weekly:
    """The report on what was labelled from `since` to `until`; `found` must begin as long before that.

    With `embedding`, the name of a model and how to ask it, texts are grouped by that; it is given what the report may show, and
    nothing else. Raises what it raises.
    """
    now, before = Counts(), Counts()
    by_policy: dict[str, Counts] = defaultdict(Counts)
    by_category: dict[str, Counts] = defaultdict(Counts)
    mistakes: deque[Mistake] = deque(maxlen=MOST_GROUPED)
    async for sample in found:
        if sample.label.at >= until:
            continue
        if sample.label.at < since:
            _count(sample, before)
            continue
        _count(sample, now, by_policy[sample.policy])
        if sample.outcome in (Outcome.CORRECTED, Outcome.REJECTED):
            mistake = _mistake(sample, policies)
            _count(sample, by_category[mistake.category])
            mistakes.append(mistake)
    vectors = {}
    if embedding is not None:
        shown = {each.decision_id: each.text for each in mistakes if each.words is not None}
        vectors = dict(zip(shown, await embedding[1](list(shown.values())), strict=True))
    return Weekly(
        since,
        until,
        now,
        before,
        by_policy,
        by_category,
        patterns(list(mistakes), vectors),
        now.mistakes - len(mistakes),
        embedding and embedding[0],
    )


def _count(sample: Sample, *counts: Counts) -> None:
    for each in counts:
        each.judged += 1
        match sample.outcome:
            case Outcome.CORRECTED:
                each.corrected += 1
            case Outcome.REJECTED:
                each.rejected += 1
            case Outcome.DISPUTED:
                each.disputed += 1
            case _:
                continue
        if sample.outcome is not Outcome.DISPUTED and sample.decision.action in (
            Action.RETURN,
            Action.FLAG,
        ):
            each.went_out += 1


def _mistake(sample: Sample, policies: Mapping[str, Policy]) -> Mistake:
    decision, review = sample.decision, sample.review
    policy = policies.get(sample.policy)
    is_shown = policy is not None and policy.content == "full"
    evidence: Any = decision.detail.get("evidence") or {}
    results: Mapping[str, Any] = evidence.get("results") or {}
    reason = (review.reason if review else None) or (
        "corrected" if sample.outcome is Outcome.CORRECTED else "no reason given"
    )
    return Mistake(
        decision_id=decision.id,
        policy=sample.policy,
        category=" ".join(reason.split())[:_CATEGORY_CHARS],
        outcome=sample.outcome,
        action=decision.action,
        confidence=decision.confidence,
        failed=tuple(name for name, each in results.items() if each.get("outcome") == "fail"),
        judges_passed=tuple(
            name
            for name, each in results.items()
            if each.get("opinion") and each.get("outcome") == "pass"
        ),
        words=words_of(decision, policies) if is_shown else None,
        comment=review.comment if review and is_shown else None,
    )


def patterns(
    mistakes: Sequence[Mistake], vectors: Mapping[str, Sequence[float]] = MappingProxyType({})
) -> list[Pattern]:
    """The mistakes by category, and within one by what their texts are about; the greatest first.

    `vectors` are the embeddings of all texts by decision id, or none at all: then their words tell.
    """
    by_category: dict[str, list[Mistake]] = defaultdict(list)
    for each in mistakes:
        by_category[each.category].append(each)
    found = []
    for category, members in by_category.items():
        shown = [each for each in members if each.words is not None]
        alike_by = [vectors[each.decision_id] for each in shown] if vectors else None
        for group in groups([each.text for each in shown], alike_by):
            alike = tuple(shown[place] for place in group.members)
            found.append(Pattern(category, group.terms, alike, levers(alike)))
        if hidden := tuple(each for each in members if each.words is None):
            found.append(Pattern(category, (), hidden, levers(hidden)))
    return sorted(found, key=lambda each: (-len(each.mistakes), each.category, each.terms))


def levers(mistakes: Sequence[Mistake]) -> tuple[str, ...]:
    """What could be done about mistakes that are alike, from what was recorded of them; the strongest first."""
    count = len(mistakes)
    found = []
    out = [each for each in mistakes if each.went_out]
    if len(out) >= _MOSTLY * count:
        found.append(_threshold(out, count))
    failed = Counter(name for each in mistakes for name in each.failed)
    found += [
        f"Check {name} fails on {number} of {count}: with on_fail: hold a person would see them first."
        for name, number in sorted(failed.items())
        if number >= _MOSTLY * count and out
    ]
    passed = Counter(name for each in mistakes for name in each.judges_passed)
    found += [
        f"Judge {name} passes {number} of {count}: mend its rubric, and measure it on them "
        "(holdgate export --format eval, holdgate judge eval)."
        for name, number in sorted(passed.items())
        if number >= _MOSTLY * count
    ]
    if not failed:
        found.append("No check fails on any of them: write one, or a rubric, for what they share.")
    corrected = sum(each.outcome is Outcome.CORRECTED for each in mistakes)
    if corrected >= _ENOUGH_CORRECTED:
        found.append(
            f"{corrected} have a correction: put some into the prompt as examples, or train on them "
            "(holdgate export --format preference)."
        )
    return tuple(found)


def _threshold(out: Sequence[Mistake], count: int) -> str:
    known = [each.confidence for each in out if each.confidence is not None]
    names = ", ".join(sorted({each.policy for each in out}))
    if not known:
        return (
            f"{len(out)} of {count} went out, with no confidence known: fit a calibrator for {names} "
            "(holdgate calibrate fit)."
        )
    return (
        f"{len(out)} of {count} went out, with a confidence of {min(known):.2f} to {max(known):.2f}: a higher "
        f"threshold for {names} would hold them, or its calibrator is out of date."
    )
