"""Holds and the people who settle them: who waits for what, and what a settled task means for its response.

Three clocks that are never mixed: how long a caller waits (`WaitingRoom.wait`), how long a reviewer's claim lasts
(`Reviews.claim`), and when the hold itself is due (`WaitingRoom.sweep`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from statistics import median

import msgspec

from gateway import edits, logs, wire
from gateway.errors import InvalidRequest, NotFound, ResponseRejected, StoreError
from gateway.ports import Bus, Clock, Event, Store
from gateway.records import DecisionRecord, Resolution, TaskKind, TaskRecord, TaskState, Verdict
from gateway.telemetry import Metrics
from policies import PolicySet, run_validators
from validators import JSON, Exchange, JsonSchema, Outcome

_SWEEP_S = 0.5
_BATCH = 500

SETTLED, OPENED = "task.settled", "task.opened"


class WaitingRoom:
    """Clients waiting for tasks to be settled; each costs a future, none a thread or a query.

    A bus event wakes them; one sweep of the store for all of them, twice a second, is the safety net when an event is lost.
    """

    def __init__(
        self,
        store: Store,
        bus: Bus,
        clock: Clock,
        metrics: Metrics,
        *,
        usd_per_minute: float | None = None,
    ) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock
        self._metrics = metrics
        self._usd_per_minute = usd_per_minute
        self._waiting: dict[str, set[asyncio.Future[bool]]] = {}
        self._latencies_s: deque[float] = deque(maxlen=100)
        self.closing = False
        self._unsubscribe = bus.subscribe(self._on_event)

    def __len__(self) -> int:
        return sum(len(futures) for futures in self._waiting.values())

    @property
    def estimated_wait_s(self) -> float | None:
        """The median time that recent tasks took to be settled; None while nothing is known."""
        return round(median(self._latencies_s), 1) if self._latencies_s else None

    async def wait(self, task_id: str, timeout_s: float) -> bool:
        """Wait until the task is settled, at most `timeout_s`; True if it is."""
        if timeout_s <= 0 or self.closing:
            return False
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(timeout_s, _give_up, future)
        self._waiting.setdefault(task_id, set()).add(future)
        self._metrics.waiting.inc()
        try:
            # Settled before this client began to wait: its event has been and gone.
            return bool(await self._store.settled([task_id])) or await future
        finally:
            timer.cancel()
            self._metrics.waiting.dec()
            if not self._waiting[task_id] - {future}:
                del self._waiting[task_id]
            else:
                self._waiting[task_id].discard(future)

    async def run(self) -> None:
        """Sweep the store until cancelled: wake the waiting, expire what is due, erase what has had its time."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self.sweep()
            except StoreError as error:
                logs.warning("sweep_failed", error=error.message)

    async def sweep(self) -> None:
        """One pass: settled tasks wake their clients, due holds expire, contents past their time are erased."""
        ids = list(self._waiting)
        for start in range(0, len(ids), _BATCH):
            for task_id in await self._store.settled(ids[start : start + _BATCH]):
                self._wake(task_id)
        now = self._clock.now()
        for task in await self._store.expire_due(now, _BATCH):
            self._metrics.settled.labels("expire").inc()
            await self._bus.publish(Event(SETTLED, task.id))
        await self._store.erase_due(now, _BATCH)

    def observe(self, task: TaskRecord) -> None:
        """Count a task that was resolved here towards the estimate of the wait."""
        if task.resolved_at is not None and task.verdict is not None:
            taken_s = (task.resolved_at - task.created_at).total_seconds()
            self._latencies_s.append(taken_s)
            self._metrics.review_seconds.observe(taken_s)
            self._metrics.settled.labels(task.verdict.value).inc()
            self._metrics.layer_requests["person"].inc()
            worked_usd = (task.worked_s or 0.0) / 60 * (self._usd_per_minute or 0.0)
            self._metrics.layer_usd["person"].inc(worked_usd)

    def close(self) -> None:
        """Let everybody go: each waiting client is answered as if its own time were up."""
        self.closing = True
        self._unsubscribe()
        for futures in self._waiting.values():
            for future in futures:
                _give_up(future)

    def _on_event(self, event: Event) -> None:
        if event.kind == SETTLED:
            self._wake(event.id)

    def _wake(self, task_id: str) -> None:
        for future in self._waiting.get(task_id, ()):
            if not future.done():
                future.set_result(True)


def _give_up(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(False)


class Released(msgspec.Struct, frozen=True):
    """A body that may go to the client; `notice` is set if nobody approved it (the deadline released it)."""

    body: bytes
    notice: str | None = None


def outcome(decision: DecisionRecord, task: TaskRecord) -> Released:
    """What a settled hold gives its client.

    Raises
    ------
    ResponseRejected
        If a reviewer rejected it, or its deadline passed and the policy says reject.
    NotFound
        If the content has been erased since.
    """
    body = task.correction if task.verdict is Verdict.CORRECT else decision.response
    hold: dict[str, JSON] = {"id": decision.id, "status": status_word(task)}
    if task.verdict is Verdict.REJECT:
        why = f": {task.reason}" if task.reason else ""
        raise ResponseRejected(f"A reviewer rejected this response{why}.", extra={"hold": hold})
    if task.state is TaskState.EXPIRED and task.on_deadline != "release":
        raise ResponseRejected(
            "Nobody reviewed this response before its deadline, so it is not released.",
            extra={"hold": hold},
        )
    if body is None:
        raise NotFound(f"The content of {decision.id} has been erased.", code="content_erased")
    if task.state is TaskState.EXPIRED:
        return Released(
            body, "Nobody reviewed this response before its deadline; it may be revised."
        )
    return Released(body)


def status_word(task: TaskRecord) -> str:
    """The hold's status for clients: held, approved, corrected, rejected, expired."""
    if task.state is TaskState.EXPIRED:
        return "expired"
    if task.verdict is None:
        return "held"
    return {"approve": "approved", "correct": "corrected", "reject": "rejected"}[task.verdict.value]


class Submission(msgspec.Struct, frozen=True):
    """What a reviewer says of a task.

    `correction` is the new text of each passage by path, or of the only passage. `version` None means the version now stored.
    """

    verdict: Verdict
    reviewer: str
    version: int | None = None
    reason: str | None = None
    comment: str | None = None
    correction: Mapping[str, str] | str | None = None


class Review(msgspec.Struct, frozen=True):
    """A task with everything a reviewer sees."""

    task: TaskRecord
    decision: DecisionRecord


class Reviews:
    """What reviewers do: look, claim, give back, decide."""

    def __init__(self, store: Store, bus: Bus, clock: Clock, room: WaitingRoom) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock
        self._room = room

    async def queue(self, limit: int, reviewer: str) -> list[TaskRecord]:
        """Unresolved tasks that the reviewer may take, most urgent first."""
        return list(await self._store.queue(self._clock.now(), limit, reviewer))

    async def get(self, task_id: str) -> Review:
        """The task and its decision. Raises `NotFound`."""
        task = await self._store.task(task_id)
        decision = await self._store.decision(task.decision_id) if task else None
        if task is None or decision is None:
            raise NotFound(f"There is no review task {task_id}.")
        return Review(task, decision)

    async def claim(self, task_id: str, reviewer: str, lease_s: float) -> TaskRecord:
        """Lease the task to the reviewer. Raises `NotFound` or `Conflict`."""
        return await self._store.claim(task_id, reviewer, self._clock.now(), lease_s)

    async def release(self, task_id: str, reviewer: str) -> TaskRecord:
        """Give the task back. Raises `NotFound` or `Conflict`."""
        return await self._store.release(task_id, reviewer, self._clock.now())

    async def submit(self, task_id: str, submission: Submission, policies: PolicySet) -> TaskRecord:
        """Settle a task and wake whoever waits for it.

        Raises
        ------
        NotFound, Conflict
            As `Store.resolve`.
        InvalidRequest
            If a correction is missing, names an unknown passage, or breaks the schema that the policy demands.
        """
        review = await self.get(task_id)
        correction = None
        if submission.verdict is Verdict.CORRECT:
            correction = _corrected(review.decision, submission.correction, policies)
        task = await self._store.resolve(
            Resolution(
                task_id=task_id,
                version=review.task.version if submission.version is None else submission.version,
                verdict=submission.verdict,
                reviewer=submission.reviewer,
                at=self._clock.now(),
                reason=submission.reason,
                comment=submission.comment,
                correction=correction,
                blind=review.task.kind is TaskKind.SECOND_OPINION,
            )
        )
        self._room.observe(task)
        await self._bus.publish(Event(SETTLED, task.id))
        return task


def _corrected(
    decision: DecisionRecord, correction: Mapping[str, str] | str | None, policies: PolicySet
) -> bytes:
    if not correction:
        raise InvalidRequest(
            "A correction needs `correction`: the new text of each passage, by its path."
        )
    if decision.response is None:
        raise InvalidRequest(
            "The content of this response has been erased; it can no longer be corrected."
        )
    reading = wire.read_response(decision.endpoint, decision.response)
    paths = [p.path for choice in reading.choices for p in wire.passages_of(choice)]
    if isinstance(correction, str):
        if len(paths) != 1:
            raise InvalidRequest(
                f"Say by path what is corrected; this response has {', '.join(paths)}."
            )
        correction = {paths[0]: correction}
    try:
        body = edits.with_texts(decision.response, correction, reading)
    except wire.Unreadable as error:
        raise InvalidRequest(f"The correction is not text that can be sent: {error}") from error
    except KeyError as error:
        known = ", ".join(paths)
        raise InvalidRequest(
            f"There is no passage {error.args[0]!r} in this response; it has {known}."
        ) from error
    _check_schema(decision, body, policies)
    return body


def _check_schema(decision: DecisionRecord, body: bytes, policies: PolicySet) -> None:
    name = decision.policy.partition("@")[0]
    policy = next((p for p in policies.policies if p.policy == name), None)
    shape = [check for check in policy.checks if isinstance(check, JsonSchema)] if policy else []
    if not shape or decision.request is None:
        return
    exchange = Exchange(
        endpoint=decision.endpoint,
        request=wire.parse_request(decision.request),
        choices=wire.read_response(decision.endpoint, body).choices,
        model=decision.model,
    )
    results = run_validators(shape, exchange, lambda: 0.0)
    failed = [result for result in results.values() if result.outcome is not Outcome.PASS]
    if failed:
        findings: list[JSON] = [
            f"{r.check}: {f.path}: {f.message}" for r in failed for f in r.findings
        ]
        raise InvalidRequest(
            "The correction breaks the schema that the policy demands; see `findings`.",
            code="correction_invalid",
            extra={"findings": findings or [r.error for r in failed]},
        )
