"""Which responses to ask people about next, and which reviewed ones teach most."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
import orjson

from gateway import wire
from gateway.learning.samples import Outcome, name_of, samples, shown, weight
from gateway.learning.topics import pick
from gateway.ports import Store
from gateway.records import DecisionRecord, TaskKind
from policies import Policy
from validators import JSON

_AT_ONCE = 50

#: So many candidates, those that weigh most, are compared; the rest is passed over.
MOST_COMPARED = 5000
_WORDS_CHARS = 2000


class Source(StrEnum):
    """Where to pick from: what nobody has judged yet, or the buffer of what was corrected, rejected, or approved though unsure."""

    UNLABELLED = "unlabelled"
    BUFFER = "buffer"


class Candidate(msgspec.Struct, frozen=True):
    """A response that may be picked. `text` is what was asked and answered, cut short; bodies are fetched again when picked."""

    decision_id: str
    weight: float
    text: str


async def candidates(
    store: Store,
    policies: Mapping[str, Policy],
    source: Source,
    *,
    since: datetime,
    policy: str | None,
) -> tuple[list[Candidate], int]:
    """Those that weigh most, by id, and how many there were in all. A response whose content is not kept is none."""
    heap: list[tuple[float, str, Candidate]] = []
    count = 0
    found = (
        _unlabelled(store, since, policy)
        if source is Source.UNLABELLED
        else _buffer(store, policies, since, policy)
    )
    async for decision in found:
        words = words_of(decision, policies)
        if words is None:
            continue
        count += 1
        each = Candidate(decision.id, weight(decision.confidence), "\n".join(words))
        heapq.heappush(heap, (each.weight, each.decision_id, each))
        if len(heap) > MOST_COMPARED:
            heapq.heappop(heap)
    return sorted((each for *_, each in heap), key=lambda each: each.decision_id), count


async def _unlabelled(
    store: Store, since: datetime, policy: str | None
) -> AsyncIterator[DecisionRecord]:
    after = ""
    while found := await store.unlabelled(since, after, _AT_ONCE):
        after = found[-1].id
        for each in found:
            if policy is None or name_of(each) == policy:
                yield each


async def _buffer(
    store: Store, policies: Mapping[str, Policy], since: datetime, policy: str | None
) -> AsyncIterator[DecisionRecord]:
    async for each in samples(store, policies, since=since, policy=policy):
        is_sure = each.review is None or each.review.kind is TaskKind.AUDIT
        if each.outcome is not Outcome.DISPUTED and not (
            is_sure and each.outcome is Outcome.APPROVED
        ):
            yield each.decision


def picked(found: list[Candidate], count: int) -> list[Candidate]:
    """The `count` of them that weigh much and differ."""
    places = pick([each.text for each in found], [each.weight for each in found], count)
    return [found[place] for place in places]


async def line_of(
    store: Store, policies: Mapping[str, Policy], candidate: Candidate
) -> dict[str, JSON] | None:
    """What is written of a candidate; None if it has been erased meanwhile."""
    decision = await store.decision(candidate.decision_id)
    if decision is None:
        return None
    request = shown(decision.request, decision, policies)
    response = shown(decision.response, decision, policies)
    if request is None or response is None:
        return None
    task = await store.task_of(decision.id)
    return {
        "id": decision.id,
        "task": task.id if task else None,
        "policy": name_of(decision),
        "confidence": decision.confidence,
        "weight": round(candidate.weight, 4),
        "request": orjson.loads(request),
        "response": orjson.loads(response),
    }


def words_of(decision: DecisionRecord, policies: Mapping[str, Policy]) -> tuple[str, str] | None:
    """What was asked last and what was answered, both cut short; None where that is not kept or cannot be read."""
    request = shown(decision.request, decision, policies)
    response = shown(decision.response, decision, policies)
    if request is None or response is None:
        return None
    try:
        reading = wire.read_response(decision.endpoint, response)
        asked = _last_words(wire.parse_request(request))
    except wire.Unreadable:
        return None
    said = (p.text for choice in reading.choices for p in wire.passages_of(choice))
    return asked[:_WORDS_CHARS], "\n".join(said)[:_WORDS_CHARS]


def _last_words(request: Mapping[str, Any]) -> str:
    """The texts of the last message of a request."""
    given = request.get("messages") or request.get("input") or request.get("prompt")
    last = given[-1] if isinstance(given, list) and given else given
    content = last.get("content") if isinstance(last, dict) else last
    if isinstance(content, list):
        parts = (each.get("text") for each in content if isinstance(each, dict))
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
