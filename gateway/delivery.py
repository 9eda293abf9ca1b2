"""What the client of a held response gets: the wait, 423, the placeholder, and in the end the response or a refusal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC
from typing import Any

import orjson
from msgspec.structs import replace

from gateway import sse, wire
from gateway.calls import Headers, Held, Reply
from gateway.errors import GatewayError, NotFound, ResponseHeld
from gateway.ports import Store
from gateway.records import DecisionRecord, TaskKind, TaskRecord, TaskState
from gateway.reviews import Released, WaitingRoom, outcome, status_word
from policies import Action
from validators import JSON

_HELD_TEXT = "This response is held for review."


class Delivery:
    """Brings held responses to their clients."""

    def __init__(
        self, store: Store, room: WaitingRoom, *, keepalive_s: float, max_waiting: int
    ) -> None:
        self._store = store
        self._room = room
        self._keepalive_s = keepalive_s
        self._max_waiting = max_waiting

    async def of(self, held: Held) -> Reply:
        """What the client of a held response gets, after as long a wait as it and the policy allow.

        Raises
        ------
        ResponseHeld
            If nobody has decided by then.
        ResponseRejected
            If the response was rejected, or its deadline passed.
        """
        if held.placeholder:
            return self._placeholder(held)
        if len(self._room) >= self._max_waiting:
            held = replace(held, wait_s=0.0)
        if held.streamed and held.wait_s > 0:
            headers = [("content-type", "text/event-stream; charset=utf-8"), *held.headers]
            return Reply(200, headers, self._stream(held))
        await self._room.wait(held.task_id, held.wait_s)
        return await self._settled(held)

    async def poll(self, decision: DecisionRecord, *, wait_s: float) -> Reply:
        """What asking for a decision's response by its id gives: as `of` for a hold, else the recorded response.

        Raises
        ------
        ResponseHeld, ResponseRejected
            As for `of`.
        NotFound
            If no content is kept.
        """
        headers = decision_headers(decision)
        task = await self._store.task_of(decision.id)
        if task is not None and task.kind is TaskKind.HOLD:
            held = Held(
                decision_id=decision.id,
                task_id=task.id,
                endpoint=decision.endpoint,
                streamed=False,
                include_usage=False,
                placeholder=False,
                wait_s=wait_s,
                due_at=task.due_at,
                headers=headers,
            )
            return await self.of(held)
        if decision.action is Action.BLOCK or decision.response is None:
            raise NotFound(f"There is no response to fetch for {decision.id}.", code="no_content")
        return Reply(
            decision.status, [("content-type", "application/json"), *headers], decision.response
        )

    async def _settled(self, held: Held) -> Reply:
        released = await self._released(held)
        headers = [("content-type", "application/json"), *held.headers]
        body = released.body
        if released.notice:
            headers.append(("x-holdgate-notice", released.notice))
            body = orjson.dumps({**orjson.loads(body), "holdgate": {"notice": released.notice}})
        if not held.streamed:
            return Reply(200, headers, body)
        headers[0] = ("content-type", "text/event-stream; charset=utf-8")
        events = sse.stream_of(held.endpoint, body, include_usage=held.include_usage)
        return Reply(200, headers, b"".join(events))

    async def _released(self, held: Held) -> Released:
        task = await self._store.task(held.task_id)
        decision = await self._store.decision(held.decision_id)
        if task is None or decision is None:
            raise NotFound(f"There is no decision {held.decision_id}.")
        if task.state not in (TaskState.RESOLVED, TaskState.EXPIRED):
            raise self.held_error(held)
        return outcome(decision, task)

    async def _stream(self, held: Held) -> AsyncIterator[bytes]:
        """Comments while a person decides, then the response as if nothing had happened, or an error event."""
        yield sse.comment("held for review")
        left_s = held.wait_s
        while left_s > 0 and not await self._room.wait(
            held.task_id, min(left_s, self._keepalive_s)
        ):
            left_s -= self._keepalive_s
            if self._room.closing:
                break
            yield sse.comment("held for review")
        try:
            body = (await self._settled(held)).body
            assert isinstance(body, bytes)
            yield body
        except GatewayError as error:
            yield sse.error_events(held.endpoint, error)

    def held_error(self, held: Held) -> ResponseHeld:
        """The 423 that says where to ask again."""
        hold = self._hold(held)
        return ResponseHeld(
            f"{_HELD_TEXT} Ask for it again at {hold['url']}.",
            extra={"hold": hold},
            headers={"location": str(hold["url"]), **dict(held.headers)},
        )

    def _hold(self, held: Held) -> dict[str, JSON]:
        path = wire.PATH_OF[wire.CHAT if held.endpoint == wire.COMPLETIONS else held.endpoint]
        return {
            "id": held.decision_id,
            "status": "held",
            "url": f"/v1{path}/{held.decision_id}",
            "expires_at": held.due_at.astimezone(UTC).isoformat() if held.due_at else None,
            "estimated_wait_s": self._room.estimated_wait_s,
        }

    def _placeholder(self, held: Held) -> Reply:
        body = orjson.dumps(
            {**placeholder(held.endpoint, held.decision_id), "holdgate": self._hold(held)}
        )
        if not held.streamed:
            return Reply(200, [("content-type", "application/json"), *held.headers], body)
        events = sse.stream_of(held.endpoint, body, include_usage=held.include_usage)
        headers = [("content-type", "text/event-stream; charset=utf-8"), *held.headers]
        return Reply(200, headers, b"".join(events))


def placeholder(endpoint: str, decision_id: str) -> dict[str, Any]:
    """A body that a chat interface can show in place of a held response."""
    if endpoint == wire.RESPONSES:
        part = {"type": "refusal", "refusal": _HELD_TEXT}
        item = {
            "id": f"msg_{decision_id}",
            "type": "message",
            "role": "assistant",
            "status": "incomplete",
        }
        return {
            "id": decision_id,
            "object": "response",
            "created_at": 0,
            "model": "",
            "status": "incomplete",
            "incomplete_details": {"reason": "content_filter"},
            "error": None,
            "output": [{**item, "content": [part]}],
        }
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "content_filter"}
    if endpoint == wire.COMPLETIONS:
        choice |= {"text": ""}
    else:
        choice |= {"message": {"role": "assistant", "content": None, "refusal": _HELD_TEXT}}
    kind = "text_completion" if endpoint == wire.COMPLETIONS else "chat.completion"
    return {"id": decision_id, "object": kind, "created": 0, "model": "", "choices": [choice]}


def decision_headers(decision: DecisionRecord) -> Headers:
    """The `x-holdgate-*` headers of a decision taken earlier."""
    headers = [
        ("x-request-id", decision.request_id),
        ("x-holdgate-decision", decision.id),
        ("x-holdgate-action", decision.action.value),
        ("x-holdgate-risk", decision.risk.value),
        ("x-holdgate-policy", decision.policy),
    ]
    if decision.confidence is not None:
        headers.append(("x-holdgate-confidence", f"{decision.confidence:.4f}"))
    return headers


def task_json(task: TaskRecord) -> dict[str, JSON]:
    """A task as the review API shows it; a second opinion without the confidence."""
    return {
        "id": task.id,
        "decision_id": task.decision_id,
        "kind": task.kind.value,
        "state": task.state.value,
        "status": status_word(task),
        "version": task.version,
        "risk": task.risk.value,
        "policy": task.policy,
        "confidence": None if task.kind is TaskKind.SECOND_OPINION else task.confidence,
        "created_at": task.created_at.isoformat(),
        "due_at": task.due_at.isoformat() if task.due_at else None,
        "claimed_by": task.claimed_by,
        "claimed_until": task.claimed_until.isoformat() if task.claimed_until else None,
        "resolved_at": task.resolved_at.isoformat() if task.resolved_at else None,
        "verdict": task.verdict.value if task.verdict else None,
        "reviewer": task.reviewer,
        "reason": task.reason,
        "comment": task.comment,
    }
