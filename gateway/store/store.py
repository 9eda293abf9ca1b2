"""The store: what `gateway.ports.Store` promises, on SQLite or PostgreSQL."""

from __future__ import annotations

import asyncio
import copy
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from gateway.errors import SettingsError, StoreError
from gateway.records import (
    Alarm,
    ApiKey,
    Asked,
    DecisionRecord,
    Delivery,
    Economics,
    Label,
    LabelledDecision,
    NewLabel,
    NewTask,
    Observed,
    Resolution,
    Said,
    Spend,
    Standing,
    Tally,
    TaskRecord,
    TaskState,
)
from gateway.store import decisions, economics, outbox, standings, tasks
from gateway.store import labels as labelling
from gateway.store.engines import Engine, Refused, SqliteEngine
from gateway.store.migrations import is_current
from gateway.store.rows import Entry, Erasure, entry

#: At most so many decisions share a commit.
_BATCH = 256

#: Contents larger than this are compressed in a thread, so that they do not hold up the event loop.
_INLINE_BYTES = 256 * 1024

#: Ids in one query: both engines limit the number of parameters.
_IDS = 500


async def open_store(url: str) -> SqlStore:
    """The store at `sqlite:///path` or `postgresql://user:password@host/name`, its schema brought up to date.

    Any number of processes may open the same store at once.

    Raises
    ------
    SettingsError
        If the URL names neither.
    StoreError
        If the database cannot be opened, or belongs to a newer version.
    """
    engine = engine_at(url)
    try:
        if not await engine.read(is_current):
            await _migrate(url)
    except BaseException:
        await engine.close()
        raise
    return SqlStore(engine)


async def _migrate(url: str) -> None:
    """Migrate in a process of its own: what Alembic takes (12 MB) would stay for as long as this one runs."""
    command = (sys.executable, "-m", "gateway.store.migrating")
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "HOLDGATE_STORE_URL": url},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines()
        raise StoreError(lines[-1] if lines else "the schema could not be brought up to date")


def engine_at(url: str) -> Engine:
    """The engine that a store's URL names, whatever its schema. Raises `SettingsError` or `StoreError` as `open_store`."""
    try:
        parts = make_url(url)
    except ArgumentError as error:
        raise SettingsError("the store must be a URL such as sqlite:///holdgate.db") from error
    if parts.drivername == "sqlite" and parts.database not in {None, "", ":memory:"}:
        path = Path(str(parts.database))
        try:
            # Prompts are in it: not for other users of the machine. SQLite gives -wal and -shm the same rights.
            path.touch(mode=0o600)
        except OSError as error:
            raise StoreError(
                f"the database file {path} cannot be opened: {error.strerror}"
            ) from error
        return SqliteEngine(str(path))
    if parts.drivername == "postgresql":
        from gateway.store.postgres import PostgresEngine  # noqa: PLC0415 - 7 MB that SQLite needs not

        return PostgresEngine(url)
    raise SettingsError(
        f"no store is known by {parts.drivername}://; write sqlite:///path or postgresql://user@host/name"
    )


class _Waiting(NamedTuple):
    entry: Entry
    written: asyncio.Future[None]


class SqlStore:
    """A `Store`. Decisions are written by group commit: while one batch commits, the next one gathers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: list[_Waiting] = []
        self._in_flight: list[_Waiting] = []
        self._singly = 0

    async def record(
        self,
        decision: DecisionRecord,
        task: NewTask | None = None,
        *,
        erase_at: datetime | None = None,
        redacted_request: bytes | None = None,
        redacted_response: bytes | None = None,
    ) -> None:
        """Store a decision and what belongs to it in one transaction, by group commit."""
        erasure = Erasure(erase_at, redacted_request, redacted_response) if erase_at else None
        bodies = (decision.request, decision.response, redacted_request, redacted_response)
        if sum(len(body) for body in bodies if body) > _INLINE_BYTES:
            rows = await asyncio.to_thread(entry, decision, task, erasure)
        else:
            rows = entry(decision, task, erasure)
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        self._waiting.append(_Waiting(rows, written))
        if not self._in_flight and len(self._waiting) == 1:
            # Not at once: whoever else is ready in this turn of the loop shares the commit.
            loop.call_soon(self._commit_next)
        await written

    def _commit_next(self) -> None:
        if self._in_flight or not self._waiting:
            return
        size = 1 if self._singly else _BATCH
        self._in_flight, self._waiting = self._waiting[:size], self._waiting[size:]
        self._singly = max(0, self._singly - 1)
        entries = [waiting.entry for waiting in self._in_flight]
        try:
            self._engine.submit(partial(decisions.record, entries=entries), self._committed)
        except StoreError as error:
            self._committed(error)

    def _committed(self, error: Exception | None) -> None:
        batch, self._in_flight = self._in_flight, []
        if isinstance(error, Refused) and len(batch) > 1:
            # One of them is to blame: each for itself, and only that one fails.
            self._waiting[:0], self._singly, batch = batch, len(batch), []
        elif error is not None and not isinstance(error, Refused):
            # Those who came meanwhile would meet the same fault: nobody waits for it twice.
            batch, self._waiting, self._singly = batch + self._waiting, [], 0
        _settle(batch, error)
        self._commit_next()

    async def decision(self, decision_id: str) -> DecisionRecord | None:
        """The decision with that id."""
        return await self._engine.read(partial(decisions.by_id, decision_id=decision_id))

    async def decision_by_upstream_id(self, upstream_id: str) -> DecisionRecord | None:
        """The newest decision on the response that the provider gave that id."""
        return await self._engine.read(partial(decisions.by_upstream_id, upstream_id=upstream_id))

    async def decision_by_fingerprint(
        self, fingerprint: str, since: datetime
    ) -> DecisionRecord | None:
        """The newest decision on the same call made since then."""
        return await self._engine.read(
            partial(decisions.by_fingerprint, fingerprint=fingerprint, since=since)
        )

    async def recent(self, policy: str, limit: int) -> Sequence[DecisionRecord]:
        """The newest decisions of a policy, newest first."""
        return await self._engine.read(partial(decisions.recent, policy=policy, limit=limit))

    async def task(self, task_id: str) -> TaskRecord | None:
        """The task with that id."""
        return await self._engine.read(partial(tasks.by_id, task_id=task_id))

    async def task_of(self, decision_id: str) -> TaskRecord | None:
        """The task of a decision, if it has one."""
        return await self._engine.read(partial(tasks.of_decision, decision_id=decision_id))

    async def awaits_opinion(self, decision_id: str) -> bool:
        """Whether a second opinion on a decision has been asked for and not yet been given."""
        return await self._engine.read(partial(tasks.awaits_opinion, decision_id=decision_id))

    async def tasks_of(self, decision_ids: Sequence[str]) -> Mapping[str, TaskRecord]:
        """The tasks of those of these decisions that have one, by decision id."""
        found: dict[str, TaskRecord] = {}
        for start in range(0, len(decision_ids), _IDS):
            some = decision_ids[start : start + _IDS]
            found |= await self._engine.read(partial(tasks.of_decisions, decision_ids=some))
        return found

    async def unlabelled(self, since: datetime, after: str, limit: int) -> Sequence[DecisionRecord]:
        """Answered decisions taken since then that nobody has labelled, by id, those after the given one."""
        return await self._engine.read(
            partial(decisions.unlabelled, since=since, after=after, limit=limit)
        )

    async def queue(
        self, now: datetime, limit: int, reviewer: str | None = None
    ) -> Sequence[TaskRecord]:
        """Unresolved tasks, highest risk first, then by deadline, then oldest; lapsed claims show as open."""
        operation = partial(tasks.queue, now=now, limit=limit, reviewer=reviewer)
        return await self._engine.read(operation)

    async def claim(self, task_id: str, reviewer: str, now: datetime, lease_s: float) -> TaskRecord:
        """Lease a task to a reviewer, or renew their lease."""
        return await self._engine.write(
            partial(tasks.claim, task_id=task_id, reviewer=reviewer, now=now, lease_s=lease_s)
        )

    async def release(self, task_id: str, reviewer: str, now: datetime) -> TaskRecord:
        """Give a claim back."""
        return await self._engine.write(
            partial(tasks.release, task_id=task_id, reviewer=reviewer, now=now)
        )

    async def resolve(self, resolution: Resolution) -> TaskRecord:
        """Resolve a task: state, review, label, audit entry and outbox row in one transaction."""
        return await self._engine.write(partial(tasks.resolve, resolution=resolution))

    async def ask_again(self, new_ids: Mapping[str, str], now: datetime) -> Asked:
        """Open tasks for second opinions, with those ids by decision, where none is open and the content is there."""
        return await self._engine.write(partial(tasks.ask_again, new_ids=new_ids, now=now))

    async def expire_due(self, now: datetime, limit: int) -> Sequence[TaskRecord]:
        """Expire unresolved tasks past their deadline, each once; return those expired."""
        if not await self._engine.read(partial(tasks.due, now=now, limit=1)):
            return []
        return await self._engine.write(partial(tasks.expire, now=now, limit=limit))

    async def settled(self, task_ids: Sequence[str]) -> Mapping[str, TaskState]:
        """Which of these tasks are terminal."""
        found: dict[str, TaskState] = {}
        for start in range(0, len(task_ids), _IDS):
            some = task_ids[start : start + _IDS]
            found |= await self._engine.read(partial(tasks.settled, task_ids=some))
        return found

    async def label(self, labels: Sequence[NewLabel]) -> int:
        """Store what people say of responses, all of it or nothing; how much of it is new."""
        return await self._engine.write(partial(labelling.add, given=labels))

    async def labels_after(self, policy: str, seq: int, limit: int) -> Sequence[Label]:
        """The labels of a policy after the one with that number, oldest first."""
        return await self._engine.read(
            partial(labelling.after, policy=policy, seq=seq, limit=limit)
        )

    async def said(self, decision_ids: Sequence[str]) -> Mapping[str, Said]:
        """What people and judges said of these decisions, by id."""
        return await self._engine.read(partial(labelling.said, decision_ids=decision_ids))

    async def labels_since(self, at: datetime) -> Sequence[Label]:
        """The labels given since then, oldest first."""
        return await self._engine.read(partial(labelling.since, at=at))

    async def label_counts(self) -> Mapping[str, tuple[int, int]]:
        """By policy, how many decisions were judged, and how many of them somebody found not acceptable."""
        return await self._engine.read(labelling.counts)

    async def labelled(self, after: str, limit: int) -> Sequence[LabelledDecision]:
        """Decisions that were judged, in order of their ids, those after the given id ("" for the first)."""
        return await self._engine.read(partial(labelling.labelled, after=after, limit=limit))

    async def tallies(self, since: datetime) -> Sequence[Tally]:
        """How many answered decisions of each policy came to each action since then."""
        return await self._engine.read(partial(economics.tallies, at=since))

    async def observed(
        self, label: str, after: tuple[datetime, str], until: datetime, limit: int
    ) -> Sequence[Observed]:
        """The numbers of a policy's answered decisions before a time, oldest first, those after a time and id."""
        operation = partial(decisions.observed, label=label, after=after, until=until, limit=limit)
        return await self._engine.read(operation)

    async def standings(self) -> Sequence[Standing]:
        """Where every policy stands, without what the monitors remember."""
        return await self._engine.read(standings.every)

    async def standing(self, policy: str) -> Standing | None:
        """Where a policy stands."""
        return await self._engine.read(partial(standings.of_policy, policy=policy))

    async def put_standing(
        self, standing: Standing, raised: Sequence[Alarm] = (), *, clear: bool = False
    ) -> bool:
        """Store a standing with its alarms if nobody has changed it since; False if somebody has."""
        return await self._engine.write(
            partial(standings.put, standing=standing, raised=raised, clear=clear)
        )

    async def alarm(self, alarm_id: str) -> Alarm | None:
        """The alarm with that id."""
        return await self._engine.read(partial(standings.alarm, alarm_id=alarm_id))

    async def open_alarms(self) -> Sequence[Alarm]:
        """The alarms that are not cleared, by policy and kind."""
        return await self._engine.read(standings.open_alarms)

    async def erase_due(self, now: datetime, limit: int) -> int:
        """Erase contents whose time has come; return how many decisions were touched."""
        if not await self._engine.read(partial(decisions.to_erase, now=now, limit=1)):
            return 0
        return await self._engine.write(partial(decisions.erase, now=now, limit=limit))

    async def spend(self, spends: Sequence[Spend]) -> None:
        """Add what judges cost to their stages' accounts, apart from any decision."""
        await self._engine.write(partial(economics.spend, spends=spends, abandoned=True))

    async def spent(self, day: date) -> Mapping[tuple[str, str], float]:
        """What the judges of each stage, by policy and name, cost on a day."""
        return await self._engine.read(partial(economics.spent, day=day))

    async def economics(self, since: datetime) -> Economics:
        """What each layer did since then."""
        return await self._engine.read(partial(economics.since, at=since))

    async def dispatch(
        self, takers: Mapping[str, Sequence[str]], before: datetime, limit: int
    ) -> int:
        """Make a delivery of each event of the outbox for each webhook that takes its kind; return how many events."""
        if not await self._engine.read(partial(outbox.is_waiting, before=before)):
            return 0
        return await self._engine.write(
            partial(outbox.dispatch, takers=takers, before=before, limit=limit)
        )

    async def take_deliveries(
        self, webhook: str, now: datetime, lease_s: float, limit: int
    ) -> Sequence[Delivery]:
        """The deliveries due, longest due first, each an attempt on; nobody else gets them within the lease."""
        if not await self._engine.read(partial(outbox.is_due, webhook=webhook, now=now)):
            return []
        return await self._engine.write(
            partial(outbox.take, webhook=webhook, now=now, lease_s=lease_s, limit=limit)
        )

    async def put_off_delivery(self, delivery_id: str, until: datetime) -> None:
        """Have a delivery due again at that time."""
        await self._engine.write(partial(outbox.put_off, delivery_id=delivery_id, until=until))

    async def finish_delivery(self, delivery_id: str) -> None:
        """Forget a delivery."""
        await self._engine.write(partial(outbox.finish, delivery_id=delivery_id))

    async def announce_samples(self, every: int, now: datetime) -> bool:
        """Put `labels.ready` into the outbox if so many training samples have come since it last was; True if so."""
        if not await self._engine.read(partial(outbox.is_ready, every=every)):
            return False
        return await self._engine.write(partial(outbox.announce, every=every, now=now))

    async def create_key(self, key: ApiKey) -> None:
        """Store an API key. Raises `Conflict` if the name is taken."""
        await self._engine.write(partial(decisions.create_key, key=key))

    async def key_by_digest(self, digest: str) -> ApiKey | None:
        """The unrevoked key with that SHA-256."""
        return await self._engine.read(partial(decisions.key_by_digest, digest=digest))

    async def keys(self) -> Sequence[ApiKey]:
        """Every key, newest first."""
        return await self._engine.read(decisions.keys)

    async def revoke_key(self, name: str, now: datetime) -> None:
        """Revoke a key. Raises `NotFound`."""
        await self._engine.write(partial(decisions.revoke_key, name=name, now=now))

    async def ping(self) -> None:
        """Return if the store can be written; raise `StoreError` if not."""
        await self._engine.write(decisions.touch)

    async def close(self) -> None:
        """Finish what is under way and let go of everything."""
        while under_way := [each.written for each in (*self._in_flight, *self._waiting)]:
            await asyncio.wait(under_way)
        await self._engine.close()


def _settle(batch: list[_Waiting], error: Exception | None) -> None:
    for _, written in batch:
        if written.done():
            continue
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(copy.copy(error))
