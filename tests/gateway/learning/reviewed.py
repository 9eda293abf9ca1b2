"""Reviewed responses, and policies that keep their content in each of the three ways."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import orjson
from msgspec.structs import replace

from gateway.records import LabelSource, NewLabel, TaskKind, Verdict
from gateway.store import SqlStore
from policies import Policy
from tests.gateway.rig import a_policy, chat
from tests.gateway.stores import a_decision, a_resolution, a_task, later

POLICIES: dict[str, Policy] = {
    content: a_policy().model_copy(update={"policy": content, "content": content})
    for content in ("full", "redacted", "digest")
}


def asks(text: str = "How much?", **more: Any) -> bytes:
    """The body of a chat request."""
    return orjson.dumps({"model": "m-1", "messages": [{"role": "user", "content": text}], **more})


JUDGED_AT = later(60)


async def judge(
    store: SqlStore,
    verdict: Verdict,
    *,
    request: bytes | None = None,
    response: bytes | None = None,
    correction: bytes | None = None,
    reason: str | None = None,
    kind: TaskKind = TaskKind.HOLD,
    at: datetime = JUDGED_AT,
    **decision: Any,
) -> str:
    """Have a response judged; the id of its decision."""
    given = {
        "policy": "full@1",
        "request": request or asks(),
        "response": response or chat("Five."),
    }
    recorded = a_decision(**{**given, **decision})
    task = a_task(kind=kind)
    await store.record(replace(recorded, inclusion=1.0, inclusion_floor=1.0), task)
    await store.resolve(
        a_resolution(task.id, verdict=verdict, reason=reason, correction=correction, at=at)
    )
    return recorded.id


async def say(store: SqlStore, decision_id: str, *, acceptable: bool) -> None:
    """Have an application say of a response whether it was acceptable."""
    label = NewLabel(decision_id, later(90), LabelSource.FEEDBACK, "app", acceptable)
    await store.label([label])
