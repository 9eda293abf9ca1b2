"""Decisions, for whoever made the call, reviewers and admins."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from gateway.api.depends import AnyCaller, Reviewer, ServicesOf
from gateway.delivery import task_json
from gateway.errors import NotFound
from gateway.labels import MAX_COMMENT
from gateway.recording import blocking_reasons
from gateway.records import LabelSource, NewLabel, Role
from validators import JSON

router = APIRouter(prefix="/decisions", tags=["decisions"])


@router.get("/{decision_id}", response_model=None)
async def show(decision_id: str, services: ServicesOf, caller: AnyCaller) -> dict[str, JSON]:
    """A decision and the state of its review. Reasons and evidence are for reviewers and admins; content is not here.

    While a second opinion is awaited, reviewers see nothing that the first one or the gateway thought: it is to be theirs.
    """
    decision = await services.store.decision(decision_id)
    is_client = caller.role is Role.CLIENT
    own = caller.key is not None and decision is not None and decision.key_id == caller.key.id
    if decision is None or (is_client and not own):
        raise NotFound(f"There is no decision {decision_id}.")
    is_blind = caller.role is Role.REVIEWER and await services.store.awaits_opinion(decision_id)
    task = None if is_blind else await services.store.task_of(decision_id)
    reasons: JSON = [] if is_blind else blocking_reasons(decision)
    shown: dict[str, JSON] = {
        "id": decision.id,
        "object": "decision",
        "created_at": decision.created_at.isoformat(),
        "endpoint": decision.endpoint,
        "model": decision.model,
        "task": decision.task_type,
        "policy": decision.policy,
        "action": decision.action.value,
        "risk": decision.risk.value,
        "confidence": None if is_blind else decision.confidence,
        "status": decision.status,
        "latency_ms": decision.latency_ms,
        "overhead_ms": decision.overhead_ms,
        "reasons": reasons,
        "review": task_json(task) if task else None,
    }
    return shown if is_client or is_blind else {**shown, "detail": decision.detail}


class Opinion(BaseModel):
    """What a reviewer says of a response, apart from its task: a second opinion, or a correction of an earlier one."""

    model_config = ConfigDict(extra="forbid")

    acceptable: StrictBool
    comment: Annotated[str, Field(max_length=MAX_COMMENT)] | None = None


@router.post("/{decision_id}/label", response_model=None)
async def label(
    decision_id: str, body: Opinion, services: ServicesOf, caller: Reviewer
) -> dict[str, JSON]:
    """Label a decision; what one labeller said last counts, and what they said before stays on record."""
    given = NewLabel(
        decision_id=decision_id,
        at=services.clock.now(),
        source=LabelSource.REVIEW,
        labeller=caller.name,
        acceptable=body.acceptable,
        comment=body.comment,
    )
    is_new = bool(await services.store.label([given]))
    return {
        "object": "label",
        "decision": decision_id,
        "acceptable": body.acceptable,
        "stored": is_new,
    }
