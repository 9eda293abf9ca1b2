"""A pipeline in this process: a real store, scripted providers, a clock that stands still."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from gateway import sse, wire
from gateway.asking import Asker
from gateway.audits import Audits
from gateway.auth import Caller
from gateway.calls import Call, Held, Reply, make_call
from gateway.errors import GatewayError
from gateway.interviews import Interviewer
from gateway.judging import Assessor
from gateway.jury import Jury
from gateway.live import LiveStreams
from gateway.local_bus import InProcessBus
from gateway.pipeline import Pipeline
from gateway.ports import Event
from gateway.recording import Recorder, new_id
from gateway.records import DecisionRecord, Role, TaskRecord
from gateway.settings import ModelEntry
from gateway.spending import Prices, Spending
from gateway.store import SqlStore
from gateway.telemetry import Metrics
from gateway.verdicts import Verdicts
from policies import Calibrator, Match, Policy, PolicySet, load_policy
from tests.fakes import FakeClock, Says, ScriptedModels

_DOCUMENT: dict[str, Any] = {
    "policy": "test",
    "risk": {"base": "low"},
    "confidence": {"source": "none", "when_uncalibrated": "return"},
}


def a_policy(*checks: Mapping[str, Any], **more: Any) -> Policy:
    """A policy with these checks that returns what they do not speak against."""
    stages = [{"name": "rules", "checks": list(checks)}] if checks else []
    document = {**_DOCUMENT, "stages": stages, **more}
    return load_policy(orjson.dumps(document).decode(), file="test.yaml", read=lambda name: name)


def forbid(what: str, on_fail: str, **more: Any) -> dict[str, Any]:
    """A check that something is not said."""
    return {"id": f"no_{what}", "use": "forbid", "patterns": [what], "on_fail": on_fail, **more}


STREAMED = {"stream": True}
KEY = {"idempotency-key": "k-1"}
RETRY = {"x-stainless-retry-count": "1"}
RETURNS = a_policy()
FLAGS = a_policy(forbid("secret", "flag"))
HOLDS = a_policy(forbid("secret", "hold"))
BLOCKS = a_policy(forbid("secret", "block"))
REDACTS = a_policy({"id": "mask", "use": "redact", "patterns": ["secret"], "replacement": "***"})
BUFFERS = a_policy(stream="buffer")
WINDOW = a_policy(forbid("secret", "block"), stream="window")
OBSERVES = a_policy(forbid("secret", "block"), mode="observe")
LOGPROBS = {"content": [{"token": "fine", "logprob": -0.1, "bytes": None, "top_logprobs": []}]}


def a_call(
    request: Mapping[str, Any] = {},
    headers: Mapping[str, str] = {},
    *,
    endpoint: str = wire.CHAT,
    now: FakeClock | None = None,
    caller: Caller | None = None,
) -> Call:
    """A call; by another caller than `local` if one is given."""
    clock = now or FakeClock()
    body = {"model": "m-1", "messages": [{"role": "user", "content": "Hi"}], **request}
    return make_call(
        decision_id=new_id("hgd", clock.now()),
        endpoint=endpoint,
        body=orjson.dumps(body),
        query="",
        headers=list(headers.items()),
        caller=caller or Caller("local", Role.ADMIN),
        received_s=clock.monotonic_s(),
    )


def chat(*texts: str | None, **more: Any) -> bytes:
    """A chat completion that says these texts, one a choice."""
    choices = [
        {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for n, text in enumerate(texts)
    ]
    return orjson.dumps(
        {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m-1-2030",
         "choices": choices, **more}
    )  # fmt: skip


def says(*texts: str, **more: Any) -> Says:
    """A provider's whole answer."""
    return Says(chat(*texts), **more)


STREAM = (("content-type", "text/event-stream; charset=utf-8"), ("x-ratelimit-remaining", "7"))


def streams(*texts: str, finish: str | None = "stop", done: bool = True, **more: Any) -> Says:
    """A provider's answer as a stream of these pieces."""
    deltas: list[dict[str, Any]] = [
        {"delta": {"content": text}, "finish_reason": None} for text in texts
    ]
    if finish is not None:
        deltas.append({"delta": {}, "finish_reason": finish})
    events = [
        sse.encode(
            orjson.dumps({"id": "chatcmpl-1", "model": "m-1", "choices": [{"index": 0, **d}]})
        )
        for d in deltas
    ]
    return Says([*events, *([sse.DONE] if done else [])], headers=STREAM, **more)


@dataclass
class Fixed:
    """Policies that stay as they are."""

    current: PolicySet = field(default_factory=lambda: PolicySet([]))
    calibrators: Mapping[str, Calibrator] = field(default_factory=dict)


class Rig:
    """The pipeline and all it stands on."""

    def __init__(
        self,
        store: SqlStore,
        *answers: Says | GatewayError,
        top: int | None = None,
        entries: Sequence[ModelEntry] = (),
    ) -> None:
        self.store = store
        self.clock = FakeClock()
        self.models = ScriptedModels(answers, top)
        self.metrics = Metrics()
        self.bus = InProcessBus()
        self.told: list[Event] = []
        self.bus.subscribe(self.told.append)
        self.recorder = Recorder(store, self.bus, self.clock, self.metrics)
        self.spending = Spending(store, self.clock)
        self.interviewer = Interviewer(
            self.models, Prices(entries), self.clock, self.metrics, concurrency=32
        )
        verdicts = Verdicts(self.bus, self.clock, limit_bytes=100_000, keep_s=60)
        jury = Jury(
            self.interviewer, verdicts, self.spending, self.clock, self.metrics, timeout_s=30
        )
        self.audits = Audits(store, secret=b"secret")
        self.policies = Fixed()
        self.assessor = assessor = Assessor(self.policies, jury, self.audits, self.clock)
        self.live = LiveStreams(assessor, self.recorder, self.clock, response_bytes=1_000_000)
        self.asker = Asker(self.models, self.clock, response_bytes=1_000_000)
        self.pipeline = Pipeline(store, self.asker, assessor, self.recorder, self.live, self.clock)

    async def answer(self, call: Call, policy: Policy) -> Reply | Held:
        """What the pipeline makes of a call."""
        return await self.pipeline.answer(call, Match(policy, "it was chosen"))

    async def reply(self, call: Call, policy: Policy) -> Reply:
        """The reply to a call that is not held."""
        reply = await self.answer(call, policy)
        assert isinstance(reply, Reply)
        return reply

    async def held(self, call: Call, policy: Policy) -> Held:
        """The news that a response is held."""
        held = await self.answer(call, policy)
        assert isinstance(held, Held)
        return held

    async def record(self, call: Call) -> DecisionRecord:
        """The decision on a call."""
        record = await self.store.decision(call.id)
        assert record is not None
        return record

    async def task(self, call: Call) -> TaskRecord | None:
        """The review task of a call."""
        return await self.store.task_of(call.id)

    @property
    def questions(self) -> list[dict[str, Any]]:
        """The bodies the providers were sent."""
        return [
            orjson.loads(call.body) for call in self.models.calls if isinstance(call.body, bytes)
        ]

    @property
    def at_rest(self) -> bool:
        """Whether nothing of any call is left behind."""
        return not self.pipeline._under_way and not self.live._ending


async def read(reply: Reply) -> bytes:
    """The whole body of a reply."""
    if isinstance(reply.body, bytes):
        return reply.body
    return b"".join([part async for part in reply.body])


def events_of(body: bytes) -> list[Any]:
    """What the events of a stream say, `[DONE]` as text."""
    return [
        orjson.loads(event.data) if event.data != b"[DONE]" else "[DONE]"
        for event in sse.Splitter().feed(body)
        if event.data is not None
    ]


def text_of(body: bytes) -> str:
    """What the first choice of a stream says."""
    pieces = [
        choice["delta"].get("content") or ""
        for event in events_of(body)
        if event != "[DONE]"
        for choice in event.get("choices", ())
    ]
    return "".join(pieces)


def parts_of(reply: Reply) -> AsyncIterator[bytes]:
    """The body of a reply that is a stream still to come."""
    assert not isinstance(reply.body, bytes)
    return reply.body


@contextmanager
def broken(path: Path, table: str = "decisions") -> Any:
    """A store that takes nothing, or nothing for this table, while this lasts."""
    with sqlite3.connect(path) as database:
        database.execute(f"ALTER TABLE {table} RENAME TO gone")
        database.commit()
        try:
            yield
        finally:
            database.execute(f"ALTER TABLE gone RENAME TO {table}")
            database.commit()
    database.close()


def header(headers: Sequence[tuple[str, str]], name: str) -> str | None:
    """The first header of that name."""
    return next((value for key, value in headers if key.lower() == name), None)


def together(rig: Rig, calls: list[Call], policy: Policy) -> list[asyncio.Task[Reply | Held]]:
    """These calls at the same time."""
    return [asyncio.create_task(rig.answer(call, policy)) for call in calls]
