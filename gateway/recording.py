"""Making a decision durable: the record, its review task, and how much of the content is kept."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import msgspec
import orjson
from msgspec.structs import replace

from gateway import edits, logs, wire
from gateway.asking import Answer
from gateway.calls import Call, relayed
from gateway.delivery import decision_headers
from gateway.errors import ResponseBlocked
from gateway.judging import Judgement
from gateway.ports import Bus, Clock, Event, Store
from gateway.records import DecisionRecord, NewTask, TaskKind
from gateway.reviews import OPENED
from gateway.telemetry import Metrics
from policies import (
    Action,
    Match,
    RiskTier,
    to_json,
)
from validators import JSON, Choice, Exchange, Passage, Pii, Secrets

#: How long content is kept for a review task of a policy that keeps none, beyond the hold's deadline.
_REVIEW_TIME = timedelta(hours=24)


class Outcome(msgspec.Struct, frozen=True):
    """Everything that is to be recorded of one call.

    `answer` is None if the provider gave none. `body` is the response as one non-streamed body, as its client may see it.
    """

    call: Call
    match: Match
    judgement: Judgement
    answer: Answer | None
    body: bytes | None
    note: str | None = None


class Recorder:
    """Writes outcomes to the store; counts and announces them once they are durable."""

    def __init__(self, store: Store, bus: Bus, clock: Clock, metrics: Metrics) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock
        self._metrics = metrics

    async def record(self, outcome: Outcome) -> tuple[DecisionRecord, NewTask | None]:
        """Store the outcome; durable on return. Raises `StoreError` if it is not, and then nothing was stored."""
        now = self._clock.now()
        began_s = self._clock.monotonic_s()
        upstream_ms = outcome.answer.upstream_ms if outcome.answer else 0.0
        latency_ms = 1000 * (began_s - outcome.call.received_s)
        judge_ms = outcome.judgement.effort.judge_ms or 0.0
        overhead_ms = latency_ms - upstream_ms - judge_ms
        task = _task(outcome, now)
        record = _decision(outcome, now, latency_ms, overhead_ms)
        erase_at: datetime | None = None
        redacted: tuple[bytes | None, bytes | None] = (None, None)
        if outcome.match.policy.content != "full":
            if outcome.match.policy.content == "redacted":
                redacted = masked(record.request), masked(record.response)
            if task is None:
                record = replace(record, request=redacted[0], response=redacted[1])
            else:
                erase_at = (task.due_at or now) + _REVIEW_TIME
        await self._store.record(
            record,
            task,
            erase_at=erase_at,
            redacted_request=redacted[0],
            redacted_response=redacted[1],
        )
        record_s = self._clock.monotonic_s() - began_s
        # The client need not wait for this: it is next after the reply that this task is about to send.
        asyncio.get_running_loop().call_soon(self._tell, outcome, record, task, record_s)
        if task is not None:
            await self._bus.publish(Event(OPENED, task.id))
        return record, task

    def _tell(
        self, outcome: Outcome, record: DecisionRecord, task: NewTask | None, record_s: float
    ) -> None:
        upstream_ms = outcome.answer.upstream_ms if outcome.answer else 0.0
        self._count(outcome, record.overhead_ms, upstream_ms, record_s)
        logs.info(
            "decision",
            id=record.id,
            request_id=record.request_id,
            policy=record.policy,
            action=record.action.value,
            risk=record.risk.value,
            confidence=record.confidence,
            status=record.status,
            task=task.id if task else None,
            latency_ms=round(record.latency_ms, 2),
            overhead_ms=round(record.overhead_ms, 2),
        )

    def _count(
        self, outcome: Outcome, overhead_ms: float, upstream_ms: float, record_s: float
    ) -> None:
        metrics, decision, policy = (
            self._metrics,
            outcome.judgement.decision,
            outcome.match.policy.policy,
        )
        metrics.decisions.labels(
            policy,
            outcome.call.endpoint,
            decision.action.value,
            decision.intended.value,
            decision.risk.value,
        ).inc()
        for result in outcome.judgement.evidence.results.values():
            metrics.checks.labels(policy, result.check, result.outcome.value).inc()
        effort = outcome.judgement.effort
        metrics.layer_requests["rules"].inc()
        if effort.judge_ms is not None:
            metrics.layer_requests["judge"].inc()
            metrics.layer_usd["judge"].inc(effort.judge_usd or 0.0)
            metrics.layer_seconds["judge"].observe(effort.judge_ms / 1000)
        metrics.overhead_seconds.observe(max(overhead_ms, 0) / 1000)
        for layer, seconds in (
            ("upstream", upstream_ms / 1000),
            ("rules", effort.rules_ms / 1000),
            ("record", record_s),
        ):
            metrics.layer_seconds[layer].observe(seconds)


def _decision(
    outcome: Outcome, now: datetime, latency_ms: float, overhead_ms: float
) -> DecisionRecord:
    call, decision, answer = outcome.call, outcome.judgement.decision, outcome.answer
    content = outcome.match.policy.content
    detail = to_json(decision, outcome.judgement.evidence, content=content != "digest")
    if content == "redacted":
        _mask_quotes(detail)
    detail["match"] = outcome.match.reason
    if outcome.note:
        detail["note"] = outcome.note
    if answer is not None:
        detail["attempts"] = [
            {"model": a.model, "status": a.status, "error": a.error, "ms": a.ms}
            for a in answer.attempts
        ]
        detail["upstream_ms"] = answer.upstream_ms
        detail["fault"] = answer.fault
    reading = answer.reading if answer else None
    body = outcome.body
    if decision.action is not Action.HOLD and not call.is_idempotent:
        body = _without_logprobs(answer, body)
    return DecisionRecord(
        id=call.id,
        created_at=now,
        endpoint=call.endpoint,
        model=(reading.model if reading else "") or call.facts.model,
        task_type=call.facts.task,
        policy=outcome.match.policy.label,
        action=decision.action,
        risk=decision.risk,
        confidence=decision.confidence,
        fingerprint=call.fingerprint,
        key_id=call.caller.key.id if call.caller.key else None,
        request_id=call.request_id,
        status=answer.status if answer else 0,
        upstream_id=reading.upstream_id if reading else None,
        streamed=call.streamed,
        latency_ms=latency_ms,
        overhead_ms=overhead_ms,
        detail=detail,
        request_digest=call.digest,
        response_digest=hashlib.sha256(body).hexdigest() if body is not None else "",
        request=call.body,
        response=body,
        response_headers=dict(relayed(answer.headers))
        if answer and decision.action is Action.HOLD
        else {},
        effort=outcome.judgement.effort,
        intended=decision.intended if answer is not None and answer.is_usable else None,
        inclusion=decision.inclusion,
        inclusion_floor=decision.inclusion_floor,
    )


def _mask_quotes(detail: dict[str, JSON]) -> None:
    """Mask what may quote the response: the keys that fields are called by, and what judges say in their own words."""
    evidence: Any = detail["evidence"]
    fields = evidence["fields"]
    paths = masked(orjson.dumps([field["path"] for field in fields])) if fields else None
    evidence["fields"] = [
        field | {"path": path}
        for field, path in zip(fields, orjson.loads(paths or b"[]"), strict=False)
    ]
    for result in evidence["results"].values():
        if opinion := result["opinion"]:
            words = masked(orjson.dumps(opinion["rationale"]))
            opinion["rationale"] = "" if words is None else orjson.loads(words)


def _task(outcome: Outcome, now: datetime) -> NewTask | None:
    decision, hold = outcome.judgement.decision, outcome.match.policy.hold
    if outcome.answer is None or not outcome.answer.is_usable:
        return None
    if decision.action is Action.HOLD:
        due_at = now + timedelta(seconds=hold.deadline)
        can_release = hold.on_deadline == "release" and decision.risk is not RiskTier.CRITICAL
        on_deadline = "release" if can_release else "reject"
        return NewTask(new_id("hgt", now), TaskKind.HOLD, 1.0, due_at, on_deadline)
    if decision.action is Action.FLAG:
        return NewTask(new_id("hgt", now), TaskKind.FLAG, decision.inclusion, None)
    if decision.audit:
        return NewTask(new_id("hgt", now), TaskKind.AUDIT, decision.inclusion, None)
    return None


def _without_logprobs(answer: Answer | None, body: bytes | None) -> bytes | None:
    """The body to keep where nobody will ask for it again: the signals are in the record, so the logprobs need not be."""
    if answer is None or answer.reading is None or body is not answer.body:
        return body
    return wire.without_logprobs(body, answer.reading)


def blocked(record: DecisionRecord) -> ResponseBlocked:
    """What the client of a blocked response is told."""
    return ResponseBlocked(
        "The response was blocked by policy; asking again gives the same policy.",
        extra={"decision": record.id, "policy": record.policy, "reasons": blocking_reasons(record)},
        headers=dict(decision_headers(record)),
    )


def blocking_reasons(record: DecisionRecord) -> list[JSON]:
    """The reasons of a recorded block that its client may see: which check, and what it found."""
    decision = record.detail.get("decision")
    reasons = decision.get("reasons") if isinstance(decision, dict) else None
    return [
        f"{reason['source']}: {reason['message']}"
        for reason in (reasons if isinstance(reasons, list) else ())
        if isinstance(reason, dict) and reason.get("action") == Action.BLOCK
    ]


def was_answered(record: DecisionRecord) -> bool:
    """Whether the provider gave a whole answer, or as much of one as it took to block it."""
    return 200 <= record.status < 300 and record.detail.get("fault") in (None, "blocked")


def new_id(prefix: str, now: datetime) -> str:
    """A fresh id: a prefix, 48 bits of milliseconds, 80 random bits (as UUIDv7, RFC 9562 section 5.7: later ids sort later)."""
    return f"{prefix}_{int(now.timestamp() * 1000):012x}{os.urandom(10).hex()}"


#: Checks report a bounded number of findings, so a body is masked in rounds.
_MASK_ROUNDS = 20


@cache
def _masking() -> tuple[Secrets, Pii]:
    return Secrets(id="secrets", use="secrets"), Pii(id="pii", use="pii")


def masked(body: bytes | None) -> bytes | None:
    """A JSON body with every secret and personal datum in it masked: in strings, keys and numbers.

    None stays None, and becomes of a body that is not JSON, is nested too deeply, or has more to mask than can be told.
    """
    if body is None:
        return None
    try:
        document = [orjson.loads(body)]
        if wire.is_too_deep(body, document):
            return None
        for _ in range(_MASK_ROUNDS):
            new = _mask_once(document)
            if new is None:
                return orjson.dumps(document[0])
            document = orjson.loads(new)
    except orjson.JSONDecodeError:
        return None
    return None


def _mask_once(document: list[JSON]) -> bytes | None:
    """The document with some of what is to be masked in it masked; None if there is nothing."""
    places = list(_strings(document))
    strings = [Passage(str(number), holder[key]) for number, (holder, key) in enumerate(places)]
    # A string may be JSON of its own, and what it is called may make a secret of it.
    for passages in (strings, [Passage("all", orjson.dumps(document).decode())]):
        exchange = Exchange("chat", {}, (Choice("", texts=tuple(passages)),))
        findings = [f for check in _masking() for f in check.run(exchange).findings]
        new = edits.masked_texts(passages, findings)
        if "all" in new:
            return new["all"].encode()
        for number, text in new.items():
            holder, key = places[int(number)]
            holder[key] = text
        if new:
            return orjson.dumps(document)
    return None


def _strings(value: Any) -> Iterator[tuple[Any, str | int]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in inner:
        if isinstance(item, str):
            yield value, key
        else:
            yield from _strings(item)
