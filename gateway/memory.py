"""What the monitors of a policy remember, and what they find in what they are told."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, NamedTuple

import orjson
from msgspec.structs import asdict

from gateway.records import Label, LabelSource, Observed, Said
from policies import Action, AuditLevel, Calibrator, Policy
from policies.auditing import Switching
from policies.drift import DriftMonitor
from policies.monitoring import (
    ALPHA,
    AgreementMonitor,
    Disagreement,
    ErrorCusum,
    miscalibration,
)
from policies.signals import ALWAYS, JUDGE
from validators import JSON

_MAX_SIGNALS = 8
_CALIBRATION_WINDOW = 500
_CALIBRATION_EVERY = 50

#: What an error rate is held against where the policy names no target.
_TARGET = 0.02

#: So many of those who judge the same response may differ; see docs/metrics.md.
_MOST_DIFFER = 0.15

_BY_PEOPLE = (LabelSource.REVIEW, LabelSource.AUDIT)


class Finding(NamedTuple):
    """What a monitor found: its kind, a sentence, the figures, and whether the calibrator may still be believed."""

    kind: str
    message: str
    evidence: dict[str, JSON]
    suspends: bool = True


def feeds(policy: Policy, calibrator: Calibrator | None, judge: str) -> bool:
    """Whether the confidence rests on what a judge says."""
    is_needed = calibrator is not None and judge in calibrator.judges
    return is_needed or any(check.id == judge for check in policy.feeding)


@dataclass(slots=True)
class Memory:
    """What the monitors of one policy remember.

    `read_to` and `read_id` are of the last decision taken in, or `read_id` is "" where all before `read_to` are. `fitted` says what the
    distributions belong to: a version of the policy and an artefact. `signals` are those watched.
    """

    read_to: datetime
    read_id: str = ""
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
    judges: dict[str, AgreementMonitor] = field(default_factory=dict)
    people: AgreementMonitor = field(default_factory=lambda: AgreementMonitor(ALPHA, _MOST_DIFFER))

    def begin(self, fitted: str) -> None:
        """Forget what belongs to another version of the policy, or another artefact."""
        if self.fitted != fitted:
            self.fitted, self.signals, self.series = fitted, None, {}
            self.judged.clear()
            self.judged_count = 0
            self.cusum = ErrorCusum(self.cusum.target)
            self.judges.clear()

    def read(
        self, rows: Sequence[Observed], policy: Policy, calibrator: Calibrator | None
    ) -> tuple[str, ...]:
        """Note how far decisions have been read; the names of the numbers to `see` of them."""
        self.read_to, self.read_id = rows[-1].at, rows[-1].id
        first = next((row for row in rows if row.values), None)
        if self.signals is None and first is not None:
            judges = [JUDGE + judge.id for judge in policy.judges]
            # Without an artefact that says what matters: first what every response has.
            known = sorted(first.values, key=lambda name: (name not in ALWAYS, name))
            needed = calibrator.score.signals if calibrator else known
            names = dict.fromkeys([*judges, *needed])
            extra = [name for name in names if name not in ("confidence", "score")]
            self.signals = ("confidence", "score", *extra[:_MAX_SIGNALS])
        return self.signals or ()

    def see(self, name: str, rows: Sequence[Observed], *, suspends: bool) -> Finding | None:
        """Take in one number of these decisions, and give the last drift that shows."""
        finding = None
        for row in rows:
            if name not in row.values:
                continue
            monitor = self.series.setdefault(name, DriftMonitor())
            drift = monitor.add(row.values[name], series=len(self.signals or ()))
            if drift is not None:
                medians = f"{drift.after:.3g}", f"{drift.before:.3g}"
                said = f"the median is {medians[0]}, it was {medians[1]}"
                if medians[0] == medians[1]:
                    said = f"the median is {medians[0]} as before, the others are not"
                message = f"the distribution of {name} has changed: of the last {drift.window} decisions {said}"
                finding = Finding(f"drift.{name}", message, dict(drift._asdict()), suspends)
        return finding

    def hear(
        self, label: Label, said: Said, policy: Policy, calibrator: Calibrator | None
    ) -> Iterator[Finding]:
        """Take in a label, with what else was said of its response, and give what it shows."""
        self.label_seq = label.seq
        if label.source not in _BY_PEOPLE:
            return
        yield from self._people(label, said)
        if label.task_id is None:
            return
        yield from self._judges(label, said, policy, calibrator)
        if label.source is LabelSource.AUDIT:
            adaptive = policy.audit.adaptive
            yield from self._audit(label, _TARGET if adaptive is None else adaptive.target)

    def _people(self, label: Label, said: Said) -> Iterator[Finding]:
        """Of each response the first two people are a pair, by what the first said last and the second first."""
        before = [
            each for each in said.labels if each.seq < label.seq and each.source in _BY_PEOPLE
        ]
        people = {each.labeller for each in before}
        if len(people) != 1 or label.labeller in people:
            return
        found = self.people.add(differ=before[-1].acceptable is not label.acceptable)
        if found is not None:
            message = (
                f"reviewers do not agree: of the last {found.n} responses that two people judged they differ on {found.differ}"
                f"{_before(found)}; labels of this time are not to be relied on until it is known why"
            )
            yield Finding("reviewers", message, dict(found._asdict()), suspends=False)

    def _judges(
        self, label: Label, said: Said, policy: Policy, calibrator: Calibrator | None
    ) -> Iterator[Finding]:
        """Each judge's verdict beside the person's, those that it passed and those that it did not apart."""
        share = _share(label)
        alpha = ALPHA / (2 * max(len(policy.judges), 1))
        for judge in policy.judges:
            passed = said.judges.get(judge.id)
            if passed is None:
                continue
            kind = f"judge.{judge.id}.{'lax' if passed else 'strict'}"
            monitor = self.judges.setdefault(kind, AgreementMonitor(alpha))
            found = monitor.add(differ=label.acceptable is not passed, share=share)
            if found is not None:
                verdicts = ("passed", "rejected") if passed else ("did not pass", "accepted")
                message = (
                    f"judge {judge.id} and people do not agree as they did: of the last {found.n} responses that it {verdicts[0]} "
                    f"people {verdicts[1]} {found.differ}{_before(found)}"
                )
                evidence: dict[str, JSON] = {"judge": judge.id, **found._asdict()}
                yield Finding(kind, message, evidence, feeds(policy, calibrator, judge.id))

    def _audit(self, label: Label, target: float) -> Iterator[Finding]:
        """What an audit shows of errors and of calibration."""
        if label.intended is Action.RETURN:
            share = _share(label)
            before = self.switching
            self.switching = before.after(label.acceptable, target, share)
            if before.level != self.switching.level == AuditLevel.STOP:
                message = "audits have failed five times while tightened: every response waits for a person"
                yield Finding(
                    "audits", message, {"target": target, "lots_failed": before.failed + 1}
                )
            if self.cusum.target != target:
                self.cusum = ErrorCusum(target)
            self.cusum = self.cusum.after(label.acceptable, share)
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
        values["judges"] = {name: _agreement(each) for name, each in self.judges.items()}
        values["people"] = _agreement(self.people)
        return orjson.dumps(values | {"judged": list(self.judged)})

    @classmethod
    def loaded(cls, data: bytes) -> Memory:
        """What `dumped` wrote, or an earlier version of it, which knew less."""
        values: dict[str, Any] = orjson.loads(data)
        memory = cls(datetime.fromisoformat(values["read_to"]), values.get("read_id", ""))
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
        judges = values.get("judges", {})
        memory.judges = {name: _agreement_of(each) for name, each in judges.items()}
        if "people" in values:
            memory.people = _agreement_of(values["people"])
        return memory


def _share(label: Label) -> float:
    """What makes up for drawing some responses more often than others, as `Audited.share`."""
    return min((label.inclusion_floor or 1.0) / (label.inclusion or 1.0), 1.0)


def _before(found: Disagreement) -> str:
    if not found.reference:
        return ""
    return f", at first it was {found.differed} of {found.reference}"


def _agreement(monitor: AgreementMonitor) -> dict[str, Any]:
    counts = [[share, *count] for share, count in monitor.counts.items()]
    values = {each.name: getattr(monitor, each.name) for each in fields(monitor)}
    return {**values, "counts": counts, "cusum": monitor.cusum and asdict(monitor.cusum)}


def _agreement_of(values: dict[str, Any]) -> AgreementMonitor:
    counts = {share: (n, differed) for share, n, differed in values["counts"]}
    cusum = values["cusum"] and ErrorCusum(**values["cusum"])
    return AgreementMonitor(**{**values, "counts": counts, "cusum": cusum})
