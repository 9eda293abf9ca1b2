"""Telling others what happened: signed events to the addresses in holdgate.yaml, and to no other.

Events are as the Standard Webhooks specification has them: JSON with `type`, `timestamp` and `data`, signed with HMAC-SHA256 in the
headers `webhook-id`, `webhook-timestamp` and `webhook-signature`. They carry ids and facts, never what was asked or answered.

An event is in the outbox as soon as what it tells of is durable. It is delivered at least once, with the same id and the same
body at every attempt, and not necessarily in order. A receiver that is down costs requests nothing: deliveries wait in the store,
through restarts, for `RETRIES_S` in all. Of several replicas one delivers an event, unless it dies or stalls on the way.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from enum import Enum, auto
from http import HTTPStatus

import orjson
from standardwebhooks import Webhook
from yarl import URL

from gateway import logs
from gateway.connections import Server
from gateway.errors import StoreError, UpstreamError, UpstreamTimeout
from gateway.ports import Clock, Store
from gateway.records import Delivery, TaskRecord
from gateway.reviews import status_word
from gateway.settings import Settings, Timeouts, WebhookEntry
from gateway.telemetry import Metrics
from validators import JSON

#: The pauses between attempts that the specification recommends ("Deliverability and reliability"), each made up to a fifth longer.
RETRIES_S = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
_JITTER = 0.2
_TOO_OLD = timedelta(seconds=sum(RETRIES_S) * (1 + _JITTER) + 3600)

_POLL_S = 0.5
_SAMPLES_S = 30.0
_BATCH = 500
_AT_ONCE = 8

#: Within this a receiver must have answered; another replica takes a delivery over after the lease.
_TIMES = Timeouts(connect=5, read=10, total=10)
_LEASE_S = 20.0

#: So much of an answer is read, so that its connection can be used again; nothing of it is kept.
_ANSWER_BYTES = 4096


class Health(Enum):
    """How a receiver took what it was last sent."""

    WELL = auto()
    AILING = auto()
    GONE = auto()


class Webhooks:
    """Empties the outbox, and delivers what webhooks ask for. To be used on one event loop."""

    def __init__(self, store: Store, clock: Clock, metrics: Metrics, settings: Settings) -> None:
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._hooks = settings.webhooks
        self._retrain_samples = settings.learning.retrain_samples
        self._signers = {
            hook.name: [Webhook(each) for each in (settings.secret(hook.secret_env) or "").split()]
            for hook in self._hooks
        }
        self._takers: dict[str, list[str]] = {}
        for hook in self._hooks:
            for kind in dict.fromkeys(hook.events):
                self._takers.setdefault(kind, []).append(hook.name)
        self._receivers = {hook.name: Server(URL(hook.url), _TIMES) for hook in self._hooks}

    async def run(self) -> None:
        """Dispatch and deliver until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_repeat(self.dispatch, _POLL_S))
            if "labels.ready" in self._takers:
                group.create_task(_repeat(self.announce, _SAMPLES_S))
            for hook in self._hooks:
                group.create_task(self._serve(hook))

    async def close(self) -> None:
        """Let go of connections."""
        for receiver in self._receivers.values():
            await receiver.close()

    async def dispatch(self) -> None:
        """Empty the outbox: each webhook gets what it asked for, the rest is dropped."""
        before = self._clock.now() - _TOO_OLD
        while await self._store.dispatch(self._takers, before, _BATCH) == _BATCH:
            pass

    async def announce(self) -> None:
        """Tell once of every so many new training samples."""
        if await self._store.announce_samples(self._retrain_samples, self._clock.now()):
            logs.info("labels_ready")

    async def _serve(self, hook: WebhookEntry) -> None:
        """Deliver to one receiver: many events at once while it is well, one at a time while it is not."""
        health = Health.WELL
        while health is not Health.GONE:
            taken, health = await self.deliver(hook, health)
            if not taken or health is not Health.WELL:
                await asyncio.sleep(_POLL_S)
        # Its deliveries stay in the store: after a restart the receiver is asked again.
        logs.error("webhook_disabled", webhook=hook.name, until="the gateway is restarted")

    async def deliver(self, hook: WebhookEntry, health: Health) -> tuple[int, Health]:
        """Attempt what is due to a receiver; how many events that were, and how it is now."""
        at_once = _AT_ONCE if health is Health.WELL else 1
        try:
            taken = await self._store.take_deliveries(
                hook.name, self._clock.now(), _LEASE_S, at_once
            )
            found = await asyncio.gather(*(self._attempt(hook, each) for each in taken))
        except StoreError as error:
            # What was taken is due again after the lease.
            logs.warning("webhook_store_failed", webhook=hook.name, error=error.message)
            return 0, health
        worst = max(found, key=lambda each: each.value, default=health)
        return len(taken), worst

    async def _attempt(self, hook: WebhookEntry, delivery: Delivery) -> Health:
        """Deliver one event, or have it tried again later. Raises `StoreError` if the outcome cannot be kept."""
        status, fault = await self._post(hook, delivery)
        counted = self._metrics.webhooks.labels
        if 200 <= status < 300:
            counted(hook.name, "delivered").inc()
            await self._store.finish_delivery(delivery.id)
            return Health.WELL
        about = {"webhook": hook.name, "id": delivery.id, "kind": delivery.kind, "fault": fault}
        if delivery.attempt > len(RETRIES_S):
            counted(hook.name, "given_up").inc()
            logs.error("webhook_given_up", subject=delivery.subject, **about)
            await self._store.finish_delivery(delivery.id)
        else:
            counted(hook.name, "failed").inc()
            pause_s = RETRIES_S[delivery.attempt - 1] * (1 + _JITTER * random.random())
            logs.warning("webhook_failed", again_in_s=round(pause_s), **about)
            until = self._clock.now() + timedelta(seconds=pause_s)
            await self._store.put_off_delivery(delivery.id, until)
        return Health.GONE if status == HTTPStatus.GONE else Health.AILING

    async def _post(self, hook: WebhookEntry, delivery: Delivery) -> tuple[int, str]:
        """The status that the receiver answers, 0 if it does not, and what is wrong with it in words."""
        body, now = await self._body(delivery), self._clock.now()
        signatures = (each.sign(delivery.id, now, body) for each in self._signers[hook.name])
        headers = [
            ("content-type", "application/json"),
            ("user-agent", "Holdgate"),
            ("webhook-id", delivery.id),
            ("webhook-timestamp", str(int(now.timestamp()))),
            ("webhook-signature", " ".join(signatures)),
        ]
        receiver, target = self._receivers[hook.name], URL(hook.url).raw_path_qs
        try:
            answer = await receiver.ask("POST", target, headers, body.encode())
            try:
                await _read_some(answer)
            finally:
                answer.close()
        except UpstreamTimeout:
            return 0, "it did not answer in time"
        except UpstreamError as error:
            return 0, error.message
        return answer.status, f"it answered {answer.status}"

    async def _body(self, delivery: Delivery) -> str:
        """The event, the same at every attempt: of a task only what does not change any more."""
        data: dict[str, JSON]
        if delivery.kind == "labels.ready":
            data = {"samples": int(delivery.subject)}
        elif delivery.kind.startswith("task."):
            task = await self._store.task(delivery.subject)
            data = {"task": delivery.subject} if task is None else _facts(task, delivery.kind)
        else:
            alarm = await self._store.alarm(delivery.subject)
            data = {"id": delivery.subject}
            if alarm is not None:
                data |= {"policy": alarm.policy, "kind": alarm.kind}
        event = {"type": delivery.kind, "timestamp": delivery.at, "data": data}
        return orjson.dumps(event).decode()


async def _read_some(body: AsyncIterator[bytes]) -> None:
    """Read a body, if it is not long."""
    size_bytes = 0
    async for part in body:
        size_bytes += len(part)
        if size_bytes > _ANSWER_BYTES:
            break


def _facts(task: TaskRecord, kind: str) -> dict[str, JSON]:
    facts: dict[str, JSON] = {
        "task": task.id,
        "decision": task.decision_id,
        "kind": task.kind.value,
        "policy": task.policy,
        "risk": task.risk.value,
        "created_at": task.created_at.isoformat(),
        "due_at": None if task.due_at is None else task.due_at.isoformat(),
    }
    if kind == "task.settled":
        facts["status"] = status_word(task)
    return facts


async def _repeat(act: Callable[[], Awaitable[None]], pause_s: float) -> None:
    """Act until cancelled, however often the store fails."""
    while True:
        try:
            await act()
        except StoreError as error:
            logs.warning("outbox_not_read", error=error.message)
        await asyncio.sleep(pause_s)
