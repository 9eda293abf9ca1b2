"""The monitors: fed from what is recorded, never from a request on its way.

Each policy's monitors are one state, kept in memory, written every FLUSH_S seconds, and at once with an alarm or a change of the
audit level. Writing is compare-and-set, and the state says how far it has read: of any number of replicas one does the work,
and when it is killed another goes on where it last wrote. What an alarm does (tighten audits, suspend the calibrator) is part of
the same write, with the alarm's outbox row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from msgspec.structs import replace

from gateway import logs
from gateway.audits import artefact_of
from gateway.errors import StoreError
from gateway.memory import Finding, Memory, feeds
from gateway.ports import Clock, LivePolicies, Store
from gateway.quality import measured, numbers
from gateway.records import Alarm, Standing
from gateway.telemetry import Metrics
from policies import AuditLevel, Calibrator, Policy
from policies.signals import JUDGE

TICK_S = 2.0
FLUSH_S = 30.0

#: Longer than a commit takes: a decision may become visible after one that was made later.
_LAG = timedelta(seconds=2)
#: Beyond this the monitors skip ahead: recent traffic is what counts.
_BEHIND = timedelta(minutes=10)
_A_TICK = 600
_LABELS_A_TICK = 500

#: Decisions are taken in so few at a time, with a pause, that no request waits for it longer than about a millisecond.
_AT_ONCE = 20
_PAUSE_S = 0.02

#: Another replica that wrote so recently is at work; this one leaves the policy to it.
_LEASE = timedelta(seconds=3 * FLUSH_S)


@dataclass(slots=True)
class _Watch:
    """A policy under watch here: the standing that is stored, and what is remembered since."""

    standing: Standing
    memory: Memory
    written_s: float
    dirty: bool = False


class Monitors:
    """Watches every policy in force."""

    def __init__(
        self,
        store: Store,
        policies: LivePolicies,
        clock: Clock,
        metrics: Metrics,
        *,
        new_id: Callable[[str, datetime], str],
    ) -> None:
        self._store = store
        self._policies = policies
        self._clock = clock
        self._metrics = metrics
        self._new_id = new_id
        self._watches: dict[str, _Watch] = {}
        self._measured_s = -FLUSH_S

    async def run(self) -> None:
        """Look every TICK_S seconds until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
                await self.measure()
            except StoreError as error:
                logs.warning("monitors_not_fed", error=error.message)

    async def tick(self) -> None:
        """Take in what has been recorded since the last time. Raises `StoreError`; what was not written is read again."""
        stored = {each.policy: each for each in await self._store.standings()}
        for policy in self._policies.current.policies:
            watch = await self._watch(policy.policy, stored.get(policy.policy))
            if watch is None:
                continue
            try:
                await self._look(policy, watch)
            except StoreError:
                del self._watches[policy.policy]
                raise

    async def measure(self) -> None:
        """Bring the metrics that Prometheus reads up to date, if it is time. Raises `StoreError`."""
        now_s = self._clock.monotonic_s()
        if now_s - self._measured_s < FLUSH_S:
            return
        self._measured_s = now_s
        since = self._clock.now() - timedelta(hours=24)
        policies, calibrators = self._policies.current.policies, self._policies.calibrators
        for name, each in (await measured(self._store, policies, calibrators, since)).items():
            for metric, value in numbers(each).items():
                self._metrics.quality.labels(name, metric).set(value)

    async def close(self) -> None:
        """Write what is remembered."""
        for policy in self._policies.current.policies:
            watch = self._watches.get(policy.policy)
            if watch is not None and watch.dirty:
                try:
                    await self._write(policy, watch, [], lift=False)
                except StoreError as error:
                    logs.warning("monitors_not_written", error=error.message)

    async def _watch(self, policy: str, stored: Standing | None) -> _Watch | None:
        """The policy's watch, if it falls to this replica."""
        watch, now = self._watches.get(policy), self._clock.now()
        if watch is not None and watch.standing.version == (stored.version if stored else 0):
            return watch
        if watch is not None and stored is not None and now - stored.at < _LEASE:
            # Another replica is at work; if it is not any more, the next tick after its lease begins anew.
            return None
        self._watches.pop(policy, None)
        whole = await self._store.standing(policy) if stored is not None else None
        standing = whole or Standing(policy, 0, now, AuditLevel.TIGHTENED)
        memory = Memory.loaded(standing.memory) if standing.memory else Memory(now - _BEHIND)
        watch = self._watches[policy] = _Watch(standing, memory, self._clock.monotonic_s())
        return watch

    async def _look(self, policy: Policy, watch: _Watch) -> None:
        calibrator = self._policies.calibrators.get(policy.confidence.calibrator or "")
        artefact, memory, standing = artefact_of(calibrator), watch.memory, watch.standing
        lift = standing.suspended is not None and standing.artefact != artefact
        memory.begin(f"{policy.label} {artefact}")
        found = [
            *await self._decisions(policy, calibrator, watch),
            *await self._labels(policy, calibrator, watch),
        ]
        if found:
            open_ = {(each.policy, each.kind) for each in await self._store.open_alarms()}
            found = [each for each in found if lift or (policy.policy, each.kind) not in open_]
        due = self._clock.monotonic_s() - watch.written_s >= FLUSH_S
        changed = lift or memory.switching.level != standing.audit_level
        if found or changed or (watch.dirty and due):
            await self._write(policy, watch, found, lift=lift)

    async def _decisions(
        self, policy: Policy, calibrator: Calibrator | None, watch: _Watch
    ) -> list[Finding]:
        memory, until = watch.memory, self._clock.now() - _LAG
        found: dict[str, Finding] = {}
        for _ in range(_A_TICK // _AT_ONCE):
            after = max((memory.read_to, memory.read_id), (until - _BEHIND, ""))
            rows = await self._store.observed(policy.label, after, until, _AT_ONCE)
            watch.dirty = watch.dirty or bool(rows)
            for name in memory.read(rows, policy, calibrator) if rows else ():
                judge = name.removeprefix(JUDGE)
                suspends = judge == name or feeds(policy, calibrator, judge)
                finding = memory.see(name, rows, suspends=suspends)
                found |= {finding.kind: finding} if finding else {}
                # One number a turn of the event loop: several that look back at once would hold it up.
                await asyncio.sleep(0)
            if len(rows) < _AT_ONCE:
                memory.read_to, memory.read_id = max((until, ""), (memory.read_to, memory.read_id))
                break
            await asyncio.sleep(_PAUSE_S)
        return list(found.values())

    async def _labels(
        self, policy: Policy, calibrator: Calibrator | None, watch: _Watch
    ) -> list[Finding]:
        memory = watch.memory
        found: dict[str, Finding] = {}
        for _ in range(_LABELS_A_TICK // _AT_ONCE):
            labels = await self._store.labels_after(policy.policy, memory.label_seq, _AT_ONCE)
            said = await self._store.said([each.decision_id for each in labels]) if labels else {}
            for label in labels:
                heard = memory.hear(label, said[label.decision_id], policy, calibrator)
                found |= {each.kind: each for each in heard}
            watch.dirty = watch.dirty or bool(labels)
            if len(labels) < _AT_ONCE:
                break
            await asyncio.sleep(_PAUSE_S)
        return list(found.values())

    async def _write(
        self, policy: Policy, watch: _Watch, found: Sequence[Finding], *, lift: bool
    ) -> None:
        """Store the memory, and with each finding its alarm and what follows from it."""
        now, memory, standing = self._clock.now(), watch.memory, watch.standing
        calibrator = self._policies.calibrators.get(policy.confidence.calibrator or "")
        suspended = None if lift else standing.suspended
        artefact = None if lift else standing.artefact
        if found:
            memory.switching = memory.switching.tightened()
            why = next((each.message for each in found if each.suspends), None)
            if calibrator is not None and suspended is None and why is not None:
                suspended, artefact = why, artefact_of(calibrator)
        new = replace(
            standing,
            version=standing.version + 1,
            at=now,
            audit_level=memory.switching.level,
            suspended=suspended,
            artefact=artefact,
            memory=memory.dumped(),
        )
        raised = [
            Alarm(
                self._new_id("hga", now), now, policy.policy, each.kind, each.message, each.evidence
            )
            for each in found
        ]
        if not await self._store.put_standing(new, raised, clear=lift):
            del self._watches[policy.policy]
            return
        watch.standing, watch.dirty, watch.written_s = new, False, self._clock.monotonic_s()
        for alarm in raised:
            self._metrics.alarms.labels(alarm.policy, alarm.kind).inc()
            logs.warning(
                "alarm", id=alarm.id, policy=alarm.policy, kind=alarm.kind, message=alarm.message
            )


def resumed(standing: Standing, now: datetime) -> Standing:
    """The standing after a person has looked: nothing is suspended, audits are tightened, and monitors begin anew."""
    memory = Memory(now)
    if standing.memory is not None:
        memory.label_seq = Memory.loaded(standing.memory).label_seq
    return Standing(
        standing.policy,
        standing.version + 1,
        now,
        memory.switching.level,
        memory=memory.dumped(),
    )
