"""What `gateway.ports.Bus` promises, within a process and through Redis; and what happens when Redis goes and comes."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest
from redis.asyncio import Redis as Client

from gateway.bus import open_bus
from gateway.ports import Bus, Event
from tests.services import Redis

SETTLED = Event("task.settled", "hgt_1")
OPENED = Event("task.opened", "hgt_2")
RECONNECTED = Event("bus.reconnected", "")


class Listener:
    """Collects the events of a bus and can wait for one."""

    def __init__(self, bus: Bus) -> None:
        self.events: list[Event] = []
        self._heard: asyncio.Queue[Event] = asyncio.Queue()
        self.stop = bus.subscribe(self._take)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self._heard.put_nowait(event)

    async def hears(self, event: Event) -> None:
        """Wait until the event comes; those before it are passed over."""
        while await self._heard.get() != event:
            pass


@pytest.fixture
def redis(redis_server: Redis) -> Iterator[Redis]:
    """The Redis server, running again after the test whatever the test did to it."""
    yield redis_server
    redis_server.restart()


@pytest.fixture(params=["in-process", "redis"])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    """A bus of each kind."""
    server: Redis | None = request.getfixturevalue("redis") if request.param == "redis" else None
    opened = await open_bus(server.url if server else None)
    yield opened
    await opened.close()


async def test_what_a_replica_keeps_another_recalls_until_its_time_is_up(redis: Redis) -> None:
    one, other = [await open_bus(redis.url) for _ in range(2)]
    await one.keep("k", b"\x00v", 60)
    await one.keep("brief", b"v", 0.001)
    assert await other.recall("k") == b"\x00v"
    assert await other.recall("nothing") is None
    await asyncio.sleep(0.01)
    assert await other.recall("brief") is None
    redis.kill()
    await one.keep("k", b"new", 60)
    assert await other.recall("k") is None
    await asyncio.gather(one.close(), other.close())


async def test_a_redis_that_hangs_holds_up_nobody_who_can_do_without(redis: Redis) -> None:
    bus = await open_bus(redis.url)
    await bus.keep("k", b"v", 60)
    psutil.Process(redis.pid).suspend()
    began_s = time.monotonic()
    assert await bus.recall("k") is None
    await bus.keep("k", b"new", 60)
    assert time.monotonic() - began_s < 0.5
    psutil.Process(redis.pid).resume()
    await bus.close()


async def test_within_one_process_nothing_is_kept_for_others() -> None:
    bus = await open_bus(None)
    await bus.keep("k", b"v", 60)
    assert await bus.recall("k") is None
    await bus.close()


async def test_every_subscriber_hears_an_event_before_publish_returns(bus: Bus) -> None:
    first, second = Listener(bus), Listener(bus)
    await bus.publish(SETTLED)
    await bus.publish(OPENED)
    assert first.events == second.events == [SETTLED, OPENED]


async def test_stopped_subscriber_hears_nothing_more(bus: Bus) -> None:
    first, second = Listener(bus), Listener(bus)
    first.stop()
    first.stop()
    await bus.publish(SETTLED)
    assert (first.events, second.events) == ([], [SETTLED])


async def test_subscriber_may_stop_itself_while_it_is_called(bus: Bus) -> None:
    heard: list[Event] = []

    def once(event: Event) -> None:
        heard.append(event)
        stop()

    stop = bus.subscribe(once)
    other = Listener(bus)
    await bus.publish(SETTLED)
    await bus.publish(OPENED)
    assert (heard, other.events) == ([SETTLED], [SETTLED, OPENED])


async def test_failing_subscriber_does_not_keep_the_event_from_others(bus: Bus) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("a subscriber's fault")

    bus.subscribe(fail)
    other = Listener(bus)
    await bus.publish(SETTLED)
    assert other.events == [SETTLED]


async def test_other_replicas_hear_an_event_once_and_its_sender_once(redis: Redis) -> None:
    here, there = await open_bus(redis.url), await open_bus(redis.url)
    at_home, abroad = Listener(here), Listener(there)
    await here.publish(SETTLED)
    await there.publish(OPENED)
    await abroad.hears(OPENED)
    await abroad.hears(SETTLED)
    await at_home.hears(OPENED)
    assert sorted(at_home.events, key=str) == sorted(abroad.events, key=str)
    assert len(at_home.events) == 2
    await here.close()
    await there.close()


async def test_message_of_a_stranger_is_passed_over(redis: Redis) -> None:
    here, there = await open_bus(redis.url), await open_bus(redis.url)
    abroad = Listener(there)
    client = Client.from_url(redis.url)
    for nonsense in (
        b"",
        b"{}",
        b"\xff\xfe",
        b"[1,2,3]",
        b'["a","b"]',
        b'["a","b","c","d"]',
        b"[" * 5000,
    ):
        await client.publish("holdgate:events", nonsense)
    await client.aclose()
    await here.publish(SETTLED)
    await abroad.hears(SETTLED)
    assert abroad.events == [SETTLED]
    await here.close()
    await there.close()


async def test_without_redis_events_stay_here_and_publishing_is_quick(redis: Redis) -> None:
    bus = await open_bus(redis.url)
    listener = Listener(bus)
    await asyncio.to_thread(redis.kill)
    began_s = time.monotonic()
    for _ in range(20):
        await bus.publish(SETTLED)
    assert time.monotonic() - began_s < 1
    assert listener.events == [SETTLED] * 20
    await bus.close()


async def test_killed_and_restarted_redis_carries_events_again(redis: Redis) -> None:
    here, there = await open_bus(redis.url), await open_bus(redis.url)
    at_home, abroad = Listener(here), Listener(there)
    for _ in range(2):
        await asyncio.to_thread(redis.kill)
        await here.publish(SETTLED)
        await asyncio.to_thread(redis.start)
        await at_home.hears(RECONNECTED)
        await abroad.hears(RECONNECTED)
        await here.publish(OPENED)
        await abroad.hears(OPENED)
    assert abroad.events == [RECONNECTED, OPENED] * 2
    await here.close()
    await there.close()


async def test_bus_opened_without_redis_connects_when_redis_comes(redis: Redis) -> None:
    await asyncio.to_thread(redis.kill)
    began_s = time.monotonic()
    bus = await open_bus(redis.url)
    assert time.monotonic() - began_s < 3
    listener = Listener(bus)
    await bus.publish(SETTLED)
    assert listener.events == [SETTLED]
    await asyncio.to_thread(redis.start)
    await listener.hears(RECONNECTED)
    await bus.close()


async def test_hung_redis_delays_a_publisher_by_half_a_second_at_most(redis: Redis) -> None:
    bus = await open_bus(redis.url)
    listener = Listener(bus)
    await bus.publish(SETTLED)
    psutil.Process(redis.pid).suspend()
    began_s = time.monotonic()
    await bus.publish(OPENED)
    waited_s = time.monotonic() - began_s
    psutil.Process(redis.pid).send_signal(signal.SIGCONT)
    assert 0.3 < waited_s < 1.5
    assert listener.events == [SETTLED, OPENED]
    await bus.close()


async def test_redis_that_falls_silent_is_taken_for_lost(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.redis_bus._SILENCE_S", 0.1)
    bus = await open_bus(redis.url)
    listener = Listener(bus)
    psutil.Process(redis.pid).suspend()
    await asyncio.sleep(0.5)
    began_s = time.monotonic()
    await bus.publish(SETTLED)
    assert time.monotonic() - began_s < 0.1
    psutil.Process(redis.pid).resume()
    await listener.hears(RECONNECTED)
    await bus.close()


async def test_quiet_but_living_redis_is_kept(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.redis_bus._SILENCE_S", 0.05)
    bus = await open_bus(redis.url)
    listener = Listener(bus)
    await asyncio.sleep(0.5)
    assert listener.events == []
    await bus.close()
