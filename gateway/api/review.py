"""The review queue: look, claim, give back, decide."""

from __future__ import annotations

from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from gateway import wire
from gateway.api.depends import Reviewer, ServicesOf
from gateway.delivery import task_json
from gateway.errors import InvalidRequest
from gateway.records import DecisionRecord, TaskKind, Verdict
from gateway.reviews import Submission
from validators import JSON

router = APIRouter(prefix="/review", tags=["review"])

_LEASE_S = 300.0


class Claim(BaseModel):
    """How long a claim lasts, in seconds."""

    model_config = ConfigDict(extra="forbid")

    lease_s: Annotated[float, Field(ge=1, le=3600)] = _LEASE_S


class Submit(BaseModel):
    """A reviewer's decision.

    `correction` is the new text of each passage by its path (`choices[0].message.content`), or just the text if the response
    has one passage. `version` is the task's version that the decision was made on; left out, the one now stored.
    """

    model_config = ConfigDict(extra="forbid")

    verdict: Verdict
    correction: dict[str, str] | str | None = None
    reason: Annotated[str, Field(max_length=500)] | None = None
    comment: Annotated[str, Field(max_length=10_000)] | None = None
    version: int | None = None


@router.get("/queue", response_model=None)
async def queue(
    services: ServicesOf, caller: Reviewer, limit: Annotated[int, Query(ge=1, le=200)] = 20
) -> dict[str, JSON]:
    """Unresolved tasks, highest risk first, then by deadline; no second opinions on what the caller has judged."""
    tasks = await services.reviews.queue(limit, caller.name)
    return {"object": "list", "data": [task_json(task) for task in tasks]}


@router.get("/{task_id}", response_model=None)
async def show(task_id: str, services: ServicesOf, caller: Reviewer) -> Response:
    """One task with its evidence: the request, the response, the passages that may be corrected, its doubtful fields.

    A second opinion is blind: there are neither reasons nor confidence, of the whole or of a field.
    """
    review = await services.reviews.get(task_id)
    decision, is_blind = review.decision, review.task.kind is TaskKind.SECOND_OPINION
    shown = {
        **task_json(review.task),
        "decision": None if is_blind else decision.detail,
        "endpoint": decision.endpoint,
        "model": decision.model,
        "request": _content(decision.request),
        "response": _content(decision.response),
        "passages": _passages(decision),
        "fields": [] if is_blind else _fields(decision),
    }
    return Response(orjson.dumps(shown), media_type="application/json")


@router.post("/{task_id}/claim", response_model=None)
async def claim(
    task_id: str, services: ServicesOf, caller: Reviewer, body: Claim | None = None
) -> dict[str, JSON]:
    """Lease a task, or renew one's lease; 409 if another reviewer has it."""
    lease_s = body.lease_s if body else _LEASE_S
    return task_json(await services.reviews.claim(task_id, caller.name, lease_s))


@router.post("/{task_id}/release", response_model=None)
async def release(task_id: str, services: ServicesOf, caller: Reviewer) -> dict[str, JSON]:
    """Give a claimed task back."""
    return task_json(await services.reviews.release(task_id, caller.name))


@router.post("/{task_id}/submit", response_model=None)
async def submit(
    task_id: str, body: Submit, services: ServicesOf, caller: Reviewer
) -> dict[str, JSON]:
    """Approve, correct or reject; 409 with the first result if somebody was first."""
    if body.correction is not None and body.verdict is not Verdict.CORRECT:
        raise InvalidRequest("`correction` goes with `verdict: correct` only.", param="correction")
    submission = Submission(
        verdict=body.verdict,
        reviewer=caller.name,
        version=body.version,
        reason=body.reason,
        comment=body.comment,
        correction=body.correction,
    )
    return task_json(await services.reviews.submit(task_id, submission, services.policies.current))


def _content(body: bytes | None) -> orjson.Fragment | None:
    """A body as it is: JSON it has been since it was recorded."""
    return None if body is None else orjson.Fragment(body)


def _fields(decision: DecisionRecord) -> JSON:
    evidence = decision.detail.get("evidence")
    return evidence.get("fields", []) if isinstance(evidence, dict) else []


def _passages(decision: DecisionRecord) -> list[JSON]:
    if decision.response is None:
        return []
    reading = wire.read_response(decision.endpoint, decision.response)
    return [
        {"path": passage.path, "text": passage.text}
        for choice in reading.choices
        for passage in wire.passages_of(choice)
    ]
