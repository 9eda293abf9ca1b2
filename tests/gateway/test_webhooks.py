"""Events reach their receivers: signed, at least once, as late as the receiver makes it, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from sqlalchemy import insert
from standardwebhooks import Webhook

from gateway.records import Alarm, Standing, TaskKind, Verdict
from gateway.settings import Settings, load_settings
from gateway.store import SqlStore, open_store
from gateway.store.engines import Engine
from gateway.store.rows import micros
from gateway.store.schema import deliveries, outbox
from gateway.telemetry import Metrics
from gateway.webhooks import RETRIES_S, Health, Webhooks
from tests.fakes import FakeClock
from tests.gateway.loopback import serving
from tests.gateway.stores import a_resolution, a_task, put, rows

SECRET, NEXT_SECRET = (f"whsec_{b64encode(bytes([n]) * 32).decode()}" for n in (1, 2))
DAY_S = 86_400


@dataclass
class Post:
    """One attempt as the receiver saw it."""

    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> Any:
        return orjson.loads(self.body)


@dataclass
class Receiver:
    """A receiver on loopback that answers with `status`; while `gate` is cleared it answers nothing."""

    url: str = ""
    status: int = 204
    posts: list[Post] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def has(self, count: int) -> None:
        """Return once so many posts have come."""
        async with asyncio.timeout(15):
            while len(self.posts) < count:
                self.arrived.clear()
                await self.arrived.wait()

    async def answer(self, request: web.Request) -> web.Response:
        self.posts.append(Post(dict(request.headers), await request.read()))
        self.arrived.set()
        await self.gate.wait()
        headers = {"location": self.url} if 300 <= self.status < 400 else {}
        return web.Response(status=self.status, headers=headers)


@asynccontextmanager
async def a_receiver(status: int = 204) -> AsyncIterator[Receiver]:
    receiver = Receiver(status=status)
    receiver.gate.set()
    async with serving(receiver.answer) as url:
        receiver.url = url
        yield receiver


def settings_for(folder: Path, *hooks: Mapping[str, Any], **more: Any) -> Settings:
    """Settings with these webhooks; what is not said of one is as for the first of all tests."""
    (folder / "policies").mkdir(exist_ok=True)
    entries = [
        {"name": f"hook-{n}", "secret_env": "SECRET", "events": ["task.opened", "task.settled"]}
        | dict(hook)
        for n, hook in enumerate(hooks)
    ]
    path = folder / "holdgate.yaml"
    path.write_bytes(orjson.dumps({"policies": "policies", "webhooks": entries, **more}))
    return load_settings(path, {"SECRET": SECRET, "BOTH": f"{SECRET} {NEXT_SECRET}"})


def a_clock() -> FakeClock:
    """A clock by which the example tasks and resolutions have happened."""
    clock = FakeClock()
    clock.advance(120)
    return clock


class Desk:
    """Webhooks on a store, with a clock that goes on only when it is told to."""

    def __init__(self, store: SqlStore, settings: Settings, clock: FakeClock | None = None) -> None:
        self.clock = clock or a_clock()
        self.metrics = Metrics()
        self.hooks = settings.webhooks
        self.webhooks = Webhooks(store, self.clock, self.metrics, settings)

    async def round(self) -> list[Health]:
        """Dispatch, and attempt everything that is due."""
        await self.webhooks.dispatch()
        found = []
        for hook in self.hooks:
            taken, health = 1, Health.WELL
            while taken and health is Health.WELL:
                taken, health = await self.webhooks.deliver(hook, health)
            found.append(health)
        return found


@asynccontextmanager
async def a_desk(store: SqlStore, settings: Settings) -> AsyncIterator[Desk]:
    desk = Desk(store, settings)
    yield desk
    await desk.webhooks.close()


async def count(engine: Engine, table: Any) -> int:
    return len(await rows(engine, table))


async def test_event_is_signed_names_its_task_and_is_delivered_once(
    store: SqlStore, tmp_path: Path
) -> None:
    async with (
        a_receiver() as receiver,
        a_desk(store, settings_for(tmp_path, {"url": receiver.url})) as desk,
    ):
        decision, task_id = await put(store, a_task())
        await store.resolve(a_resolution(task_id, verdict=Verdict.REJECT, reason="r", comment="c"))
        await desk.round()
        await desk.round()
    opened, settled = sorted(receiver.posts, key=lambda post: post.event["type"])
    for post in (opened, settled):
        signed = Webhook(SECRET).sign(post.id, desk.clock.now(), post.body.decode())
        assert post.headers["webhook-signature"] == signed
        assert post.headers["webhook-timestamp"] == str(int(desk.clock.now().timestamp()))
        assert post.event["data"]["task"] == task_id
        assert post.event["data"]["decision"] == decision.id
    assert (opened.event["type"], settled.event["type"]) == ("task.opened", "task.settled")
    assert settled.event["data"]["status"] == "rejected"
    assert opened.id != settled.id


async def test_event_holds_ids_and_facts_and_nothing_that_anybody_wrote(
    store: SqlStore, tmp_path: Path
) -> None:
    words: dict[str, Any] = {"reason": "CANARY", "comment": "CANARY", "correction": b'"CANARY"'}
    async with (
        a_receiver() as receiver,
        a_desk(store, settings_for(tmp_path, {"url": receiver.url})) as desk,
    ):
        _, task_id = await put(
            store, a_task(), request=b"CANARY", response=b"CANARY", detail={"words": "CANARY"}
        )
        await store.resolve(
            a_resolution(task_id, verdict=Verdict.CORRECT, reviewer="CANARY", **words)
        )
        await desk.round()
    assert len(receiver.posts) == 2
    assert not [post for post in receiver.posts if b"CANARY" in post.body]


async def test_a_secret_that_is_being_replaced_and_its_successor_both_sign(
    store: SqlStore, tmp_path: Path
) -> None:
    async with a_receiver() as receiver:
        hook = {"url": receiver.url, "secret_env": "BOTH"}
        async with a_desk(store, settings_for(tmp_path, hook)) as desk:
            await put(store, a_task())
            await desk.round()
    (post,) = receiver.posts
    now, body = desk.clock.now(), post.body.decode()
    expected = [Webhook(each).sign(post.id, now, body) for each in (SECRET, NEXT_SECRET)]
    assert post.headers["webhook-signature"].split() == expected


@pytest.mark.parametrize("status", [500, 404, 429, 302, 307])
async def test_refused_event_comes_again_after_each_pause_with_the_same_id_until_it_is_given_up(
    store: SqlStore, engine: Engine, tmp_path: Path, status: int
) -> None:
    async with (
        a_receiver(status) as receiver,
        a_desk(store, settings_for(tmp_path, {"url": receiver.url})) as desk,
    ):
        await put(store, a_task())
        for number, pause_s in enumerate(RETRIES_S, start=1):
            await desk.round()
            assert len(receiver.posts) == number
            desk.clock.advance(pause_s - 0.001)
            await desk.round()
            assert len(receiver.posts) == number, "the pause is never shorter than is said"
            desk.clock.advance(0.2 * pause_s + 0.001)
        await desk.round()
        assert len(receiver.posts) == len(RETRIES_S) + 1
        desk.clock.advance(7 * DAY_S)
        await desk.round()
    assert len(receiver.posts) == len(RETRIES_S) + 1
    assert len({(post.id, post.body) for post in receiver.posts}) == 1
    assert await count(engine, deliveries) == 0


async def test_redirect_is_not_followed(store: SqlStore, tmp_path: Path) -> None:
    async with a_receiver() as elsewhere, a_receiver(307) as receiver:
        settings = settings_for(tmp_path, {"url": receiver.url})
        receiver.url = elsewhere.url
        async with a_desk(store, settings) as desk:
            await put(store, a_task())
            assert await desk.round() == [Health.AILING]
    assert (len(receiver.posts), len(elsewhere.posts)) == (1, 0)


async def test_pauses_are_jittered(store: SqlStore, engine: Engine, tmp_path: Path) -> None:
    async with (
        a_receiver(500) as receiver,
        a_desk(store, settings_for(tmp_path, {"url": receiver.url})) as desk,
    ):
        for _ in range(8):
            await put(store, a_task())
        await desk.round()
    assert len({row["next_at"] for row in await rows(engine, deliveries)}) == 8


async def test_receiver_that_is_gone_is_asked_no_more_until_a_restart(
    store: SqlStore, tmp_path: Path
) -> None:
    async with a_receiver(410) as gone, a_receiver() as well:
        settings = settings_for(tmp_path, {"url": gone.url}, {"url": well.url})
        first = Desk(store, settings)
        running = asyncio.create_task(first.webhooks.run())
        for number in range(1, 5):
            await put(store, a_task())
            await well.has(number)
        await _stop(running)
        await first.webhooks.close()
        assert len(gone.posts) == 1

        gone.status, gone.posts = 204, []
        async with a_desk(store, settings) as second:
            second.clock.advance(10)
            await second.round()
        assert len({post.id for post in gone.posts}) == 4


async def test_dead_receiver_holds_up_no_other_and_no_request(
    store: SqlStore, tmp_path: Path
) -> None:
    async with a_receiver() as dead, a_receiver() as well:
        dead.gate.clear()
        settings = settings_for(tmp_path, {"url": dead.url}, {"url": well.url})
        desk = Desk(store, settings)
        running = asyncio.create_task(desk.webhooks.run())
        for _ in range(20):
            began_s = time.monotonic()
            await put(store, a_task())
            assert time.monotonic() - began_s < 2
        await well.has(20)
        assert len(dead.posts) <= 8
        await _stop(running)
        await desk.webhooks.close()


async def test_receiver_that_was_down_gets_everything_once_it_is_back(
    store: SqlStore, engine: Engine, tmp_path: Path
) -> None:
    async with (
        a_receiver(503) as receiver,
        a_desk(store, settings_for(tmp_path, {"url": receiver.url})) as desk,
    ):
        ids = {(await put(store, a_task()))[1] for _ in range(30)}
        await desk.round()
        receiver.status, receiver.posts = 204, []
        desk.clock.advance(400)
        await desk.round()
    assert {post.event["data"]["task"] for post in receiver.posts} == ids
    assert await count(engine, deliveries) == 0


async def test_two_replicas_deliver_each_event_once(store: SqlStore, tmp_path: Path) -> None:
    async with a_receiver() as receiver:
        settings = settings_for(tmp_path, {"url": receiver.url})
        desks = [Desk(store, settings) for _ in range(3)]
        ids = {(await put(store, a_task()))[1] for _ in range(40)}
        await asyncio.gather(*(desk.round() for desk in desks))
        for desk in desks:
            await desk.round()
            await desk.webhooks.close()
    assert len(receiver.posts) == 40
    assert {post.event["data"]["task"] for post in receiver.posts} == ids


async def test_event_whose_deliverer_died_is_delivered_by_another_with_the_same_id(
    store: SqlStore, tmp_path: Path
) -> None:
    async with a_receiver() as receiver:
        settings = settings_for(tmp_path, {"url": receiver.url})
        receiver.gate.clear()
        await put(store, a_task())
        clock = a_clock()
        dying, other = Desk(store, settings, clock), Desk(store, settings, clock)
        attempt = asyncio.create_task(dying.round())
        await receiver.has(1)
        await _stop(attempt)
        await dying.webhooks.close()

        receiver.gate.set()
        await other.round()
        assert len(receiver.posts) == 1, "it may still be on its way"
        clock.advance(21)
        await other.round()
        await other.webhooks.close()
    first, second = receiver.posts
    assert (first.id, first.body) == (second.id, second.body)


async def test_events_wait_through_a_restart_of_the_store(tmp_path: Path, store_url: str) -> None:
    async with a_receiver() as receiver:
        settings = settings_for(tmp_path, {"url": receiver.url})
        store = await open_store(store_url)
        await put(store, a_task())
        await store.close()
        store = await open_store(store_url)
        async with a_desk(store, settings) as desk:
            await desk.round()
        await store.close()
    assert len(receiver.posts) == 1


async def test_outbox_is_emptied_though_nobody_asked_for_anything(
    store: SqlStore, engine: Engine, tmp_path: Path
) -> None:
    await asyncio.gather(*(put(store, a_task()) for _ in range(1200)))
    async with a_desk(store, settings_for(tmp_path)) as desk:
        await desk.webhooks.dispatch()
    assert await count(engine, outbox) == await count(engine, deliveries) == 0


async def test_webhook_gets_only_the_kinds_it_asked_for(store: SqlStore, tmp_path: Path) -> None:
    async with a_receiver() as receiver:
        hook = {"url": receiver.url, "events": ["task.settled"]}
        async with a_desk(store, settings_for(tmp_path, hook)) as desk:
            _, task_id = await put(store, a_task())
            await put(store, a_task())
            await store.resolve(a_resolution(task_id))
            await desk.round()
    assert [post.event["type"] for post in receiver.posts] == ["task.settled"]


async def test_alarm_is_told_with_its_policy_and_kind(store: SqlStore, tmp_path: Path) -> None:
    at = a_clock().now()
    alarm = Alarm("hga_1", at, "refunds", "drift.confidence", "CANARY", {"psi": 0.4})
    standing = Standing("refunds", 1, at, "tightened")
    async with a_receiver() as receiver:
        hook = {"url": receiver.url, "events": ["alarm.raised"]}
        async with a_desk(store, settings_for(tmp_path, hook)) as desk:
            assert await store.put_standing(standing, [alarm])
            await desk.round()
    (post,) = receiver.posts
    assert post.event["data"] == {"id": "hga_1", "policy": "refunds", "kind": "drift.confidence"}


async def test_what_is_older_than_all_retries_is_dropped(
    store: SqlStore, engine: Engine, tmp_path: Path
) -> None:
    async with (
        a_receiver() as receiver,
        a_desk(store, settings_for(tmp_path, {"url": receiver.url})) as desk,
    ):
        desk.clock.advance(5 * DAY_S)
        row = {"at": micros(FakeClock().now()), "kind": "task.opened", "subject": "hgt_old"}
        delivery = {"id": "m", "webhook": "gone", "attempts": 3, "next_at": 0, **row}
        await engine.write(lambda c: c.execute(insert(outbox), [row]))
        await engine.write(lambda c: c.execute(insert(deliveries), [delivery]))
        await desk.round()
    assert receiver.posts == []
    assert await count(engine, outbox) == await count(engine, deliveries) == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"HTTP/1.1 200\r\n" * 3,
        b"HTTP/1.1 204 No Content\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nlocation: http://[::bad\r\n\r\n",
    ],
)
async def test_whatever_a_receiver_answers_the_event_is_kept_or_delivered(
    store: SqlStore, engine: Engine, tmp_path: Path, answer: bytes
) -> None:
    async def hostile(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}}")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(hostile, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with a_desk(store, settings_for(tmp_path, {"url": f"http://127.0.0.1:{port}/"})) as desk:
        await put(store, a_task())
        assert await desk.round() == [Health.AILING]
    server.close()
    assert await count(engine, deliveries) == 1


async def test_answer_without_end_is_not_read(store: SqlStore, tmp_path: Path) -> None:
    sent_bytes = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        await reader.readuntil(b"}}")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with suppress(OSError):
            while True:
                writer.write(b"x" * 65_536)
                await writer.drain()
                sent_bytes += 65_536

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with a_desk(store, settings_for(tmp_path, {"url": f"http://127.0.0.1:{port}/"})) as desk:
        await put(store, a_task())
        async with asyncio.timeout(10):
            assert await desk.round() == [Health.WELL]
    server.close()
    assert sent_bytes < 20_000_000


class TestLabelsReady:
    async def test_is_told_once_for_every_so_many_samples_whoever_asks_and_however_often(
        self, store: SqlStore, tmp_path: Path
    ) -> None:
        async with a_receiver() as receiver:
            settings = settings_for(
                tmp_path,
                {"url": receiver.url} | {"events": ["labels.ready"]},
                learning={"retrain_samples": 3},
            )
            desks = [Desk(store, settings) for _ in range(4)]

            async def learn(samples: int) -> None:
                for _ in range(samples):
                    _, task_id = await put(store, a_task())
                    await store.resolve(a_resolution(task_id, verdict=Verdict.REJECT))
                    await asyncio.gather(*(desk.webhooks.announce() for desk in desks))
                await desks[0].round()

            await learn(2)
            assert receiver.posts == []
            await learn(1)
            assert [post.event["data"] for post in receiver.posts] == [{"samples": 3}]
            await learn(2)
            assert len(receiver.posts) == 1
            restarted = Desk(store, settings)
            desks.append(restarted)
            await learn(5)
            for desk in desks:
                await desk.webhooks.close()
        assert sorted(post.event["data"]["samples"] for post in receiver.posts) == [3, 6, 9]

    async def test_an_audit_that_found_nothing_teaches_nothing(
        self, store: SqlStore, tmp_path: Path
    ) -> None:
        settings = settings_for(
            tmp_path,
            {"url": "http://127.0.0.1:9"} | {"events": ["labels.ready"]},
            learning={"retrain_samples": 1},
        )
        _, task_id = await put(store, a_task(kind=TaskKind.AUDIT, due_at=None))
        await store.resolve(a_resolution(task_id))
        assert not await store.announce_samples(
            settings.learning.retrain_samples, FakeClock().now()
        )
        _, task_id = await put(store, a_task())
        await store.resolve(a_resolution(task_id))
        assert await store.announce_samples(settings.learning.retrain_samples, FakeClock().now())


async def _stop(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
