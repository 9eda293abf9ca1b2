"""Audits and monitors over a real store: what is recorded raises alarms, and an alarm changes what is decided."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import orjson
import pytest
from msgspec.structs import replace

from gateway.audits import Audits, artefact_of
from gateway.errors import StoreError
from gateway.memory import Finding, Memory
from gateway.monitors import FLUSH_S, Monitors, resumed
from gateway.recording import new_id
from gateway.records import LabelSource, NewLabel, NewTask, Observed, Standing, TaskKind, Verdict
from gateway.store import SqlStore
from gateway.store.engines import Engine
from gateway.store.schema import outbox
from gateway.telemetry import Metrics
from policies import Action, AuditLevel, Calibrator, Policy, PolicySet, load_calibrator
from policies.auditing import LEAST_OF_RATE
from policies.calibration import Knot
from policies.signals import ALWAYS, SignalName
from tests.fakes import FakeClock, Says
from tests.gateway.rig import Fixed, Rig, a_call, a_policy, broken, says
from tests.gateway.stores import a_decision, a_resolution, a_task, engine_of, rows
from validators import JSON

ADAPTIVE = {"rate": 0.1, "adaptive": {"min": 0.05, "max": 0.3}}
POLICY = a_policy(
    confidence={"source": "logprob", "calibrator": "demo", "when_uncalibrated": "hold"},
    audit=ADAPTIVE,
)
CALIBRATOR = load_calibrator(
    """{"format": 1, "name": "demo", "created_at": "2029-01-01T00:00:00Z", "source": "logprob", "model": "*", "n": 500,
    "score": {"kind": "signal", "name": "mean_logprob"}, "calibrator": {"kind": "platt", "a": -1, "b": 0}}""",
    file="demo.json",
)
NOW = datetime(2030, 1, 1, tzinfo=UTC)
REFITTED = CALIBRATOR.model_copy(update={"created_at": CALIBRATOR.created_at + timedelta(days=1)})


class World:
    """A store, a clock, and replicas that watch."""

    def __init__(self, store: SqlStore, policy: Policy = POLICY) -> None:
        self.store, self.clock, self.policy = store, FakeClock(), policy
        self.live = Fixed(PolicySet([policy]), {"demo": CALIBRATOR})
        self.monitors = self.replica()
        self.audits = Audits(store, secret=b"s")

    def replica(self) -> Monitors:
        return Monitors(self.store, self.live, self.clock, Metrics(), new_id=new_id)

    def refit(self, calibrator: Calibrator) -> None:
        self.live.calibrators = {"demo": calibrator}

    async def decide(self, confidences: Any, ticks: int = 1) -> None:
        """Record so many decisions with these confidences, and let the monitors look."""
        for confidence in map(float, confidences):
            self.clock.advance(0.01)
            decision = {"confidence": confidence, "score": confidence}
            await self.store.record(
                a_decision(
                    id=new_id("hgd", self.clock.now()),
                    created_at=self.clock.now(),
                    policy=self.policy.label,
                    action=Action.RETURN,
                    detail={"decision": decision, "evidence": {"signals": {}}},
                )
            )
        for _ in range(ticks):
            await self.tick()

    async def audit(
        self, wrong: Any, confidence: float = 0.98, second: Any = (), floor: float = 0.3
    ) -> None:
        """Record audited decisions and resolve their tasks; somebody else judges the first of them as well."""
        audited = {
            "action": Action.RETURN,
            "intended": Action.RETURN,
            "inclusion": 0.3,
            "inclusion_floor": floor,
            "confidence": confidence,
        }
        ids = await self.review(wrong, a_task(kind=TaskKind.AUDIT, inclusion=0.3), **audited)
        review, now = LabelSource.REVIEW, self.clock.now()
        pairs = zip(ids, second, strict=False)
        said = [NewLabel(id_, now, review, "bob", acceptable=not bad) for id_, bad in pairs]
        await self.store.label(said)
        await self.tick()

    async def judge(self, wrong: Any, *, passed: bool) -> None:
        """Record held decisions that a judge passed or not, resolve their tasks, and look."""
        said: dict[str, JSON] = {
            "outcome": "pass" if passed else "fail",
            "score": 0.9,
            "opinion": {"parts": []},
        }
        detail: dict[str, JSON] = {"evidence": {"results": {"same": said}}}
        await self.review(wrong, a_task(), intended=Action.HOLD, inclusion=1.0, detail=detail)
        await self.tick()

    async def review(self, wrong: Any, task: NewTask, **decision: Any) -> list[str]:
        """Record decisions with such a task each, and resolve these; the ids."""
        ids = []
        for bad in wrong:
            made = a_decision(created_at=self.clock.now(), policy=self.policy.label, **decision)
            own = replace(task, id=f"hgt_{made.id}", due_at=None)
            await self.store.record(made, own)
            verdict = Verdict.REJECT if bad else Verdict.APPROVE
            await self.store.resolve(a_resolution(own.id, verdict=verdict, at=self.clock.now()))
            ids.append(made.id)
        return ids

    async def tick(self) -> None:
        self.clock.advance(3)
        await self.monitors.tick()
        await self.audits.refresh()

    async def kinds(self) -> list[str]:
        return [alarm.kind for alarm in await self.store.open_alarms()]


@pytest.fixture
def world(sqlite_store: SqlStore) -> World:
    return World(sqlite_store)


async def drifted(world: World) -> None:
    draw = np.random.default_rng(1)
    await world.decide(draw.beta(8, 1, 1100), ticks=3)
    assert await world.kinds() == []
    await world.decide(draw.beta(3, 1, 200), ticks=2)


async def test_a_drift_suspends_the_calibrator_tightens_audits_and_tells(world: World) -> None:
    await drifted(world)
    kinds = await world.kinds()
    assert kinds == ["drift.confidence", "drift.score"]
    why = world.audits.suspended("test", CALIBRATOR)
    assert why is not None
    assert "the distribution of confidence has changed" in why
    assert world.audits.level("test") is AuditLevel.TIGHTENED
    (alarm, _) = await world.store.open_alarms()
    assert {"window", "distance", "critical", "stability"} <= alarm.evidence.keys()
    await world.decide(np.random.default_rng(2).beta(3, 1, 300), ticks=2)
    assert await world.kinds() == kinds


async def test_each_alarm_is_told_once(world: World, database: Path) -> None:
    await drifted(world)
    await world.decide(np.random.default_rng(2).beta(3, 1, 300), ticks=2)
    engine: Engine = engine_of(f"sqlite:///{database}")
    told = [row["subject"] for row in await rows(engine, outbox) if row["kind"] == "alarm.raised"]
    await engine.close()
    assert sorted(told) == sorted(alarm.id for alarm in await world.store.open_alarms())


async def test_while_suspended_there_is_no_confidence_and_the_policy_says_what_follows(
    sqlite_store: SqlStore, world: World
) -> None:
    await drifted(world)
    rig = Rig(sqlite_store, says("fine"))
    rig.policies.calibrators = {"demo": CALIBRATOR}
    call = a_call()
    await rig.audits.refresh()
    await rig.held(call, POLICY)
    record = await rig.record(call)
    assert record.confidence is None
    reasons = str(record.detail["decision"])
    assert "calibrator demo is suspended: the distribution of confidence has changed" in reasons


async def test_a_new_artefact_lifts_the_suspension_and_begins_anew(world: World) -> None:
    await drifted(world)
    world.refit(REFITTED)
    assert world.audits.suspended("test", REFITTED) is None
    assert world.audits.suspended("test", CALIBRATOR) is not None
    await world.tick()
    assert await world.kinds() == []
    standing = await world.store.standing("test")
    assert standing is not None
    assert standing.suspended is None
    assert standing.memory is not None
    assert Memory.loaded(standing.memory).series == {}
    await world.decide(np.random.default_rng(3).beta(3, 1, 1500), ticks=4)
    assert await world.kinds() == []


async def test_a_person_lifts_it_too(world: World) -> None:
    await drifted(world)
    standing = await world.store.standing("test")
    assert standing is not None
    again = resumed(standing, world.clock.now())
    assert await world.store.put_standing(again, clear=True)
    await world.audits.refresh()
    assert world.audits.suspended("test", CALIBRATOR) is None
    assert await world.kinds() == []
    world.clock.advance(120)
    await world.tick()
    assert await world.kinds() == []


async def test_what_is_remembered_survives_a_restart(world: World) -> None:
    draw = np.random.default_rng(4)
    await world.decide(draw.beta(8, 1, 1150), ticks=3)
    await world.monitors.close()
    world.monitors = world.replica()
    await world.decide(draw.beta(3, 1, 150), ticks=2)
    assert await world.kinds() == ["drift.confidence", "drift.score"]


async def test_what_was_not_written_is_read_again_after_a_crash(world: World) -> None:
    draw = np.random.default_rng(5)
    await world.decide(draw.beta(8, 1, 600), ticks=2)
    await world.decide(draw.beta(8, 1, 500), ticks=2)
    world.monitors = world.replica()
    await world.decide(draw.beta(3, 1, 200), ticks=3)
    assert await world.kinds() == ["drift.confidence", "drift.score"]


async def test_of_two_replicas_one_does_the_work(world: World) -> None:
    other = world.replica()
    draw = np.random.default_rng(6)
    await world.decide(draw.beta(8, 1, 1100), ticks=3)
    await other.tick()
    world.clock.advance(FLUSH_S)
    await world.tick()
    for _ in range(3):
        await other.tick()
    await world.decide(draw.beta(3, 1, 300), ticks=1)
    await other.tick()
    assert await world.kinds() == ["drift.confidence", "drift.score"]
    version = (await world.store.standings())[0].version
    await other.tick()
    assert (await world.store.standings())[0].version == version


async def test_a_store_that_fails_loses_no_finding(world: World, database: Path) -> None:
    draw = np.random.default_rng(7)
    await world.decide(draw.beta(8, 1, 1150), ticks=3)
    await world.decide(draw.beta(3, 1, 150), ticks=0)
    with broken(database, "standings"), pytest.raises(StoreError):
        await world.monitors.tick()
    world.clock.advance(3)
    with broken(database, "alarms"), pytest.raises(StoreError):
        await world.monitors.tick()
    for _ in range(4):
        await world.tick()
    assert await world.kinds() == ["drift.confidence", "drift.score"]


async def test_good_audits_relax_the_rate_and_bad_ones_raise_an_alarm(world: World) -> None:
    await world.audit([False] * 250)
    assert world.audits.level("test") is AuditLevel.NORMAL
    await world.audit([False] * 500)
    assert world.audits.level("test") is AuditLevel.REDUCED
    await world.audit([True, False, False, False, False] * 20)
    assert world.audits.level("test") is AuditLevel.TIGHTENED
    assert "errors" in await world.kinds()
    assert world.audits.suspended("test", CALIBRATOR) is not None


async def test_when_too_many_audits_fail_everything_waits_for_a_person(
    sqlite_store: SqlStore, world: World
) -> None:
    await world.audit([True, False] * 125)
    assert world.audits.level("test") is AuditLevel.STOP
    assert "audits" in await world.kinds()
    rig = Rig(sqlite_store, says("fine"))
    await rig.audits.refresh()
    policy = a_policy(audit=ADAPTIVE)
    call = a_call()
    await rig.held(call, policy)
    record = await rig.record(call)
    assert "too many audits have failed" in str(record.detail["decision"])


async def test_audits_that_were_drawn_twice_as_often_count_for_a_half(world: World) -> None:
    await world.audit([False] * 260, floor=0.15)
    assert world.audits.level("test") is AuditLevel.TIGHTENED
    await world.audit([False] * 260, floor=0.15)
    assert world.audits.level("test") is AuditLevel.NORMAL


async def test_confidence_that_is_too_high_raises_an_alarm_of_its_own(world: World) -> None:
    draw = np.random.default_rng(8)
    await world.audit(draw.random(250) < 0.08, confidence=0.999)
    assert "calibration" in await world.kinds()


def with_judge(on_fail: str) -> Policy:
    check = {"id": "same", "use": "consistency", "compare": "normal_form", "on_fail": on_fail}
    confidence = {"source": "logprob", "calibrator": "demo", "when_uncalibrated": "hold"}
    return a_policy(check, confidence=confidence, audit={"rate": 0.3})


@pytest.mark.parametrize(
    ("on_fail", "suspends"), [("hold", False), ("score", True)], ids=["apart", "feeding the score"]
)
@pytest.mark.parametrize("passed", [True, False], ids=["lax", "strict"])
async def test_a_judge_that_people_contradict_raises_an_alarm_and_suspends_what_rests_on_it(
    sqlite_store: SqlStore, on_fail: str, suspends: bool, passed: bool
) -> None:
    world = World(sqlite_store, with_judge(on_fail))
    await world.judge([not passed] * 205, passed=passed)
    assert await world.kinds() == []
    await world.judge([passed] * 20, passed=passed)
    (alarm,) = await world.store.open_alarms()
    assert alarm.kind == f"judge.same.{'lax' if passed else 'strict'}"
    assert alarm.evidence.items() >= {"judge": "same", "reference": 200, "differed": 0}.items()
    assert "judge same and people do not agree as they did" in alarm.message
    assert "at first it was 0 of 200" in alarm.message
    assert world.audits.level("test") is AuditLevel.TIGHTENED
    assert (world.audits.suspended("test", CALIBRATOR) is not None) is suspends


async def test_reviewers_who_differ_raise_an_alarm_and_the_calibrator_is_still_believed(
    world: World,
) -> None:
    await world.audit([False] * 40, second=[False] * 40)
    assert await world.kinds() == []
    await world.audit([False] * 40, second=[True, False] * 20)
    (alarm,) = await world.store.open_alarms()
    assert alarm.kind == "reviewers"
    assert alarm.evidence["limit"] == 0.15
    assert "labels of this time are not to be relied on" in alarm.message
    assert world.audits.level("test") is AuditLevel.TIGHTENED
    assert world.audits.suspended("test", CALIBRATOR) is None


async def test_one_reviewer_alone_is_no_disagreement_whatever_they_say_later(world: World) -> None:
    await world.audit([False] * 40)
    for label in await world.store.labels_after("test", 0, 100):
        again = NewLabel(
            label.decision_id, world.clock.now(), label.source, "ann", acceptable=False
        )
        await world.store.label([again])
    await world.tick()
    assert await world.kinds() == []


def drift_of(name: str, *, suspends: bool) -> Finding | None:
    draw, memory = np.random.default_rng(9), Memory(NOW)
    values = [*draw.beta(8, 1, 1100), *draw.beta(3, 1, 200)]
    rows = [Observed(f"hgd_{n}", NOW, {name: value}) for n, value in enumerate(values)]
    assert memory.read(rows, with_judge("hold"), None) == ("confidence", "score", "judge.same")
    return memory.see(name, rows, suspends=suspends)


def test_what_a_judge_scores_is_watched_like_any_other_number() -> None:
    found = drift_of("judge.same", suspends=False)
    assert found is not None
    assert (found.kind, found.suspends) == ("drift.judge.same", False)


async def test_what_is_remembered_of_judges_and_people_is_read_as_it_was_written(
    sqlite_store: SqlStore,
) -> None:
    world = World(sqlite_store, with_judge("hold"))
    await world.judge([False] * 30, passed=True)
    await world.audit([False] * 8, second=[True, False] * 4)
    await world.monitors.close()
    standing = await world.store.standing("test")
    assert standing is not None
    assert standing.memory is not None
    memory = Memory.loaded(standing.memory)
    assert memory.judges["judge.same.lax"].counts == {1.0: (30, 0)}
    assert memory.people.counts == {1.0: (8, 4)}
    assert Memory.loaded(memory.dumped()) == memory


def test_what_an_earlier_version_remembered_is_read() -> None:
    values = orjson.loads(Memory(NOW).dumped())
    for name in ("read_id", "judges", "people"):
        del values[name]
    assert Memory.loaded(orjson.dumps(values)) == Memory(NOW)


async def test_the_inclusion_recorded_is_the_one_drawn_with(sqlite_store: SqlStore) -> None:
    rig = Rig(sqlite_store, says("fine"))
    policy = a_policy(audit=ADAPTIVE)
    drawn = {}
    for _ in range(60):
        call = a_call()
        await rig.reply(call, policy)
        record, task = await rig.record(call), await rig.task(call)
        assert (record.inclusion, record.inclusion_floor) == (0.3, 0.3)
        assert (task is not None) is (rig.audits.draw(call.id) < 0.3)
        assert task is None or task.inclusion == 0.3
        drawn[call.id] = task
    assert any(drawn.values())
    assert not all(drawn.values())


CURVE = tuple(
    Knot(confidence=1 - n / 100, coverage=n / 50, risk=0.1, low=0.0, high=0.2) for n in range(1, 51)
)
SPREADING = CALIBRATOR.model_copy(update={"curve": CURVE})


async def test_what_is_less_sure_is_audited_more_often_and_the_same_draw_decides(
    sqlite_store: SqlStore,
) -> None:
    """Of 120 answers that are sure and 120 that are not, those are reviewed that the id, the secret and the artefact say."""
    found: dict[float, set[tuple[float, float]]] = {}
    for logprob in (-0.004, -0.09):
        token = {"token": "fine", "logprob": logprob, "bytes": None, "top_logprobs": []}
        choice = {"index": 0, "message": {"content": "fine"}, "logprobs": {"content": [token]}}
        rig = Rig(
            sqlite_store,
            Says(orjson.dumps({"choices": [choice | {"finish_reason": "stop"}]})),
            top=1,
        )
        rig.policies.calibrators = {"demo": SPREADING}
        policy = a_policy(
            confidence={"source": "logprob", "calibrator": "demo", "when_uncalibrated": "return"},
            thresholds={"confident": 0.9, "unsure": 0.5},
            audit={"rate": 0.3},
        )
        for _ in range(120):
            call = a_call()
            await rig.reply(call, policy)
            record, task = await rig.record(call), await rig.task(call)
            assert (task is not None) is (rig.audits.draw(call.id) < record.inclusion)
            assert task is None or task.inclusion == record.inclusion
            found.setdefault(logprob, set()).add((record.inclusion, record.inclusion_floor))
    ((sure, floor),), ((unsure, same),) = found.values()
    assert floor == same == LEAST_OF_RATE * 0.15
    assert LEAST_OF_RATE * 0.3 <= sure < 0.3 < unsure
    standing = Standing(
        "test", 1, rig.clock.now(), "normal", suspended="drift", artefact=artefact_of(SPREADING)
    )
    await sqlite_store.put_standing(standing)
    await rig.audits.refresh()
    call = a_call()
    await rig.reply(call, policy)
    record = await rig.record(call)
    assert (record.inclusion, record.inclusion_floor) == (0.3, 0.15)


def test_artefacts_of_one_name_are_told_apart() -> None:
    assert artefact_of(None) is None
    assert artefact_of(CALIBRATOR) != artefact_of(REFITTED)


def test_without_an_artefact_what_every_response_has_is_watched_first() -> None:
    values = dict.fromkeys(get_args(SignalName), -1.0)
    memory = Memory(NOW)
    watched = memory.read([Observed("hgd_1", NOW, values)], POLICY, None)
    assert set(watched) == {"confidence", "score", *ALWAYS}
