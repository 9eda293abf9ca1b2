"""The monitors: fed from what is recorded, never from a request on its way.

Each policy's monitors are one state, kept in memory, written every FLUSH_S seconds, and at once with an alarm or a change of the
audit level. Writing is compare-and-set, and the state says how far it has read: of any number of replicas one does the work,
and when it is killed another goes on where it last wrote. What an alarm does (tighten audits, suspend the calibrator) is part of
the same write, with the alarm's outbox row.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import orjson

from gateway import logs
from gateway.audits import artefact_of
from gateway.errors import StoreError
from gateway.ports import Clock, LivePolicies, Store
from gateway.quality import measured, numbers
from gateway.records import Alarm, Label, LabelSource, Observed, Standing
from gateway.telemetry import Metrics
from policies import Action, AuditLevel, Calibrator, Policy
from policies.auditing import Switching
from policies.monitoring import DriftMonitor, ErrorCusum, miscalibration
from validators import JSON

TICK_S = 2.0
FLUSH_S = 30.0

#: Longer than a commit takes: a decision may become visible after one that was made later.
_LAG = timedelta(seconds=2)
#: Beyond this the monitors skip ahead: recent traffic is what counts.
_BEHIND = timedelta(minutes=10)
_A_TICK = 600
_LABELS_AT_ONCE = 500

#: Decisions are taken in so few at a time, with a pause, that no request waits for it longer than about a millisecond.
_AT_ONCE = 20
_PAUSE_S = 0.02

#: Another replica that wrote so recently is at work; this one leaves the policy to it.
_LEASE = timedelta(seconds=3 * FLUSH_S)

_MAX_SIGNALS = 8
_CALIBRATION_WINDOW = 500
_CALIBRATION_EVERY = 50

#: What an error rate is held against where the policy names no target.
_TARGET = 0.02


class Finding(NamedTuple):
    """What a monitor found: its kind, a sentence, and the figures."""

    kind: str
    message: str
    evidence: dict[str, JSON]


@dataclass(slots=True)
class Memory:
    """What the monitors of one policy remember.

    `fitted` says what the distributions belong to: a version of the policy and an artefact. `signals` are those watched.
    """

    read_to: datetime
    label_seq: int = 0
    fitted: str = ""
    signals: tuple[str, ...] | None = None
    series: dict[str, DriftMonitor] = field(default_factory=dict)
    switching: Switching = field(default_factory=Switching)
    cusum: ErrorCusum = field(default_factory=lambda: ErrorCusum(_TARGET))
    judged: deque[tuple[float, bool]] = field(
        default_factory=lambda: deque(maxlen=_CALIBRATION_WINDOW)
    )
    judged_count: int = 0

    def begin(self, fitted: str) -> None:
        """Forget the distributions of another version of the policy, or another artefact."""
        if self.fitted != fitted:
            self.fitted, self.signals, self.series = fitted, None, {}
            self.judged.clear()
            self.judged_count = 0

    def see(self, row: Observed, calibrator: Calibrator | None) -> Iterator[Finding]:
        """Take in a decision, and give the drift that shows."""
        self.read_to = row.at
        if self.signals is None and row.values:
            needed = calibrator.score.signals if calibrator else sorted(row.values)
            extra = [name for name in needed if name not in ("confidence", "score")]
            self.signals = ("confidence", "score", *extra[:_MAX_SIGNALS])
        watched = self.signals or ()
        for name in watched:
            if name not in row.values:
                continue
            monitor = self.series.setdefault(name, DriftMonitor())
            drift = monitor.add(row.values[name], series=len(watched))
            if drift is not None:
                message = (
                    f"the distribution of {name} has changed: of the last {drift.window} decisions the median is "
                    f"{drift.after:.3g}, it was {drift.before:.3g}"
                )
                yield Finding(f"drift.{name}", message, dict(drift._asdict()))

    def hear(self, label: Label, target: float) -> Iterator[Finding]:
        """Take in an audit, and give what it shows of errors and of calibration."""
        self.label_seq = label.seq
        if label.source is not LabelSource.AUDIT or label.task_id is None:
            return
        if label.intended is Action.RETURN:
            before, self.switching = self.switching, self.switching.after(label.acceptable, target)
            if before.level != self.switching.level == AuditLevel.STOP:
                message = "audits have failed five times while tightened: every response waits for a person"
                yield Finding(
                    "audits", message, {"target": target, "lots_failed": before.failed + 1}
                )
            if self.cusum.target != target:
                self.cusum = ErrorCusum(target)
            share = (label.inclusion_floor or 1.0) / (label.inclusion or 1.0)
            self.cusum = self.cusum.after(label.acceptable, min(share, 1.0))
            if self.cusum.is_alarm:
                message = f"audits find more errors among what is returned than the target of {target:.1%}"
                yield Finding("errors", message, dict(asdict(self.cusum)))
        if label.confidence is None:
            return
        self.judged.append((label.confidence, label.acceptable))
        self.judged_count += 1
        if self.judged_count % _CALIBRATION_EVERY == 0:
            found = miscalibration(list(self.judged))
            if found is not None:
                message = (
                    f"confidence is not what it says: {found.claimed:.3f} on average over {found.n} audits, of which "
                    f"{found.found:.3f} were acceptable"
                )
                yield Finding("calibration", message, dict(found._asdict()))

    def dumped(self) -> bytes:
        """As JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["series"] = {
            name: {"reference": each.reference, "recent": list(each.recent), "seen": each.seen}
            for name, each in self.series.items()
        }
        values |= {"switching": asdict(self.switching), "cusum": asdict(self.cusum)}
        return orjson.dumps(values | {"judged": list(self.judged)})

    @classmethod
    def loaded(cls, data: bytes) -> Memory:
        """What `dumped` wrote."""
        values: dict[str, Any] = orjson.loads(data)
        memory = cls(datetime.fromisoformat(values["read_to"]))
        for name in ("label_seq", "fitted", "judged_count"):
            setattr(memory, name, values[name])
        memory.signals = None if values["signals"] is None else tuple(values["signals"])
        for name, each in values["series"].items():
            monitor = memory.series[name] = DriftMonitor(each["reference"], seen=each["seen"])
            monitor.recent.extend((less, more) for less, more in each["recent"])
        switching = values["switching"]
        memory.switching = Switching(
            **{
                **switching,
                "level": AuditLevel(switching["level"]),
                "lots": tuple(switching["lots"]),
            }
        )
        memory.cusum = ErrorCusum(**values["cusum"])
        memory.judged.extend((confidence, bool(ok)) for confidence, ok in values["judged"])
        return memory


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
            *await self._labels(policy, watch),
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
            after = max(memory.read_to, until - _BEHIND)
            rows = await self._store.observed(policy.label, after, until, _AT_ONCE)
            found |= {each.kind: each for row in rows for each in memory.see(row, calibrator)}
            watch.dirty = watch.dirty or bool(rows)
            if len(rows) < _AT_ONCE:
                memory.read_to = max(until, memory.read_to)
                break
            await asyncio.sleep(_PAUSE_S)
        return list(found.values())

    async def _labels(self, policy: Policy, watch: _Watch) -> list[Finding]:
        adaptive = policy.audit.adaptive
        target = _TARGET if adaptive is None else adaptive.target
        labels = await self._store.labels_after(
            policy.policy, watch.memory.label_seq, _LABELS_AT_ONCE
        )
        found = {each.kind: each for row in labels for each in watch.memory.hear(row, target)}
        watch.dirty = watch.dirty or bool(labels)
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
            if calibrator is not None and suspended is None:
                suspended, artefact = found[0].message, artefact_of(calibrator)
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
