"""Reviewed responses as samples to learn from, with as much of their content as their policy lets out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from enum import StrEnum

import msgspec

from gateway.ports import Store
from gateway.recording import masked
from gateway.records import DecisionRecord, LabelledDecision, TaskRecord, Verdict
from policies import Policy

#: Decisions in memory at once, bodies included.
_AT_ONCE = 50

#: What a weight is highest for: with a confidence of 0 it is 100, with 1 it is 0.99.
_SOFTENING = 0.01


class Outcome(StrEnum):
    """What people made of a response; `disputed` where its labels and its review do not agree."""

    APPROVED = "approved"
    CORRECTED = "corrected"
    REJECTED = "rejected"
    DISPUTED = "disputed"


class Sample(msgspec.Struct, frozen=True):
    """A response that people judged. Bodies are None where the policy keeps none, and masked where it keeps them so."""

    label: LabelledDecision
    review: TaskRecord | None
    request: bytes | None
    response: bytes | None
    correction: bytes | None

    @property
    def decision(self) -> DecisionRecord:
        """What was decided on it."""
        return self.label.decision

    @property
    def policy(self) -> str:
        """The name of its policy."""
        return name_of(self.decision)

    @property
    def outcome(self) -> Outcome:
        """What people made of it."""
        verdict = self.review.verdict if self.review else None
        if verdict is None:
            return Outcome.APPROVED if self.label.acceptable else Outcome.REJECTED
        if (verdict is Verdict.APPROVE) is not self.label.acceptable:
            return Outcome.DISPUTED
        return _OUTCOMES[verdict]


_OUTCOMES = {
    Verdict.APPROVE: Outcome.APPROVED,
    Verdict.CORRECT: Outcome.CORRECTED,
    Verdict.REJECT: Outcome.REJECTED,
}


def name_of(decision: DecisionRecord) -> str:
    """The name of a decision's policy, without its digest."""
    return decision.policy.partition("@")[0]


def weight(confidence: float | None) -> float:
    """How much a response can teach: ``1 / (confidence + 0.01)``, from 0.99 to 100; 0.99 if nobody knows a confidence."""
    return 1 / ((1.0 if confidence is None else confidence) + _SOFTENING)


def shown(
    body: bytes | None, decision: DecisionRecord, policies: Mapping[str, Policy]
) -> bytes | None:
    """A body as the policy of its decision lets it out; masked where the policy is gone."""
    policy = policies.get(name_of(decision))
    match policy.content if policy else "redacted":
        case "full":
            return body
        case "redacted":
            return masked(body)
        case _:
            return None


async def samples(
    store: Store,
    policies: Mapping[str, Policy],
    *,
    since: datetime | None = None,
    policy: str | None = None,
) -> AsyncIterator[Sample]:
    """Every judged response, in order of decision ids; those labelled since then, and of that policy, if that is said."""
    after = ""
    while found := await store.labelled(after, _AT_ONCE):
        after = found[-1].decision.id
        wanted = [
            each
            for each in found
            if (since is None or each.at >= since)
            and (policy is None or name_of(each.decision) == policy)
        ]
        reviews = await store.tasks_of([each.decision.id for each in wanted])
        for each in wanted:
            decision, review = each.decision, reviews.get(each.decision.id)
            yield Sample(
                each,
                review,
                shown(decision.request, decision, policies),
                shown(decision.response, decision, policies),
                shown(review.correction if review else None, decision, policies),
            )
