"""Several gateway processes on one store: what one knows the others know, and what breaks mends itself."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import asyncpg
import httpx
import psutil
import pytest
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance.acting import Reviewer, caller, policy, request, scripted, until
from tests.conftest import GatewayFactory
from tests.processes import Server, start_gateway, write_config
from tests.services import Postgres, Redis

POLICIES = {
    "held": policy("held", "hold: {wait: 30s}"),
    "lapses": policy("lapses", "hold: {wait: 0s, deadline: 300ms}"),
    "live": policy("live", "stream: observe").replace("hold", "return").replace("critical", "low"),
    "plain": "policy: plain\nstream: buffer\nconfidence: {source: none, when_uncalibrated: return}\n",
}
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Replicas:
    """Two gateways on one PostgreSQL and one Redis."""

    one: Server
    two: Server
    store_url: str


@pytest.fixture(scope="module")
def replicas(
    postgres: Postgres,
    redis_server: Redis,
    upstream: Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Replicas]:
    store_url = postgres.new_database()
    folder = tmp_path_factory.mktemp("replicas")
    configs = [
        write_config(
            folder / name,
            upstream_url=upstream.url,
            policies=POLICIES,
            store_url=store_url,
            redis_url=redis_server.url,
        )
        for name in ("one", "two")
    ]
    with start_gateway(configs[0], name="one") as one, start_gateway(configs[1], name="two") as two:
        yield Replicas(one, two, store_url)
    for server in (one, two):
        assert not server.tracebacks


@dataclass(frozen=True)
class Cast:
    """A client and a reviewer of the first gateway (`one`, `ann`), and of the second (`two`, `ben`)."""

    one: httpx.AsyncClient
    two: httpx.AsyncClient
    ann: Reviewer
    ben: Reviewer

    async def seconds_to_wake(self, marker: str) -> float:
        """How long a client of the first gateway waits on after a decision made on the second."""
        waiting = asyncio.create_task(ask(self.one, "held", marker))
        task = await self.ben.task(marker)
        await until(lambda: waiting_clients(self.one, 1))
        began_s = time.monotonic()
        (await self.ben.submit(task["id"], "approve")).raise_for_status()
        answer = await waiting
        assert answer.json()["choices"][0]["message"]["content"] == marker
        return time.monotonic() - began_s


@pytest.fixture
async def cast(replicas: Replicas) -> AsyncIterator[Cast]:
    async with AsyncExitStack() as stack:
        one, two = [
            await stack.enter_async_context(caller(server.url))
            for server in (replicas.one, replicas.two)
        ]
        yield Cast(one, two, Reviewer(one), Reviewer(two))


async def ask(
    http: httpx.AsyncClient, task: str, marker: str, *, stream: bool = False, retry: int = 0
) -> httpx.Response:
    """Ask a gateway for a response that says the marker."""
    body = request("chat", task, scripted(text=marker), stream=stream)
    return await http.post(CHAT, json=body, headers={"x-stainless-retry-count": str(retry)})


async def waiting_clients(http: httpx.AsyncClient, count: int) -> bool:
    """Whether so many clients wait at this gateway."""
    return bool((await http.get("/readyz")).json()["waiting"] == count)


async def metric(http: httpx.AsyncClient, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    text = (await http.get("/metrics")).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


# ------------------------------------------------------------------------------------------- two of one mind


async def test_decision_on_one_replica_wakes_the_client_of_the_other_at_once(cast: Cast) -> None:
    took_s = [await cast.seconds_to_wake(f"across {number}") for number in range(8)]
    assert max(took_s) < 0.3, took_s


async def test_of_two_reviewers_on_two_replicas_exactly_one_decides(cast: Cast) -> None:
    markers = [f"contested {number}" for number in range(6)]
    waiting = [asyncio.create_task(ask(cast.one, "held", marker)) for marker in markers]
    tasks = [await cast.ann.task(marker) for marker in markers]
    for task in tasks:
        answers = await asyncio.gather(
            *(who.submit(task["id"], "approve") for who in (cast.ann, cast.ben) for _ in range(3))
        )
        assert sorted(answer.status_code for answer in answers) == [200, *[409] * 5]
    assert [(await each).status_code for each in waiting] == [200] * 6


async def test_retry_at_another_replica_waits_for_the_same_hold(cast: Cast) -> None:
    first = asyncio.create_task(ask(cast.one, "held", "sent elsewhere"))
    task = await cast.ann.task("sent elsewhere")
    retry = asyncio.create_task(ask(cast.two, "held", "sent elsewhere", retry=1))
    await until(lambda: waiting_clients(cast.two, 1))
    await cast.ann.submit(task["id"], "approve")
    for answer in (await first, await retry):
        assert answer.headers["x-holdgate-decision"] == task["decision_id"]
        assert answer.status_code == 200


async def test_hold_of_a_killed_replica_is_answered_by_the_other(
    replicas: Replicas, cast: Cast
) -> None:
    waiting = asyncio.create_task(ask(cast.one, "held", "orphaned"))
    task = await cast.ben.task("orphaned")
    replicas.one.kill()
    with pytest.raises(httpx.TransportError):
        await waiting
    retry = asyncio.create_task(ask(cast.two, "held", "orphaned", retry=1))
    await until(lambda: waiting_clients(cast.two, 1))
    await cast.ben.submit(task["id"], "approve")
    assert (await retry).headers["x-holdgate-decision"] == task["decision_id"]
    await asyncio.to_thread(replicas.one.start)


async def test_each_hold_expires_once_however_many_replicas_look(
    replicas: Replicas, cast: Cast
) -> None:
    before = [await metric(c, "holdgate_tasks_settled_total") for c in (cast.one, cast.two)]
    held = await asyncio.gather(
        *(ask(c, "lapses", f"lapsing {n}") for n in range(20) for c in (cast.one, cast.two))
    )
    ids = [answer.json()["error"]["hold"]["id"] for answer in held]

    async def all_expired() -> bool:
        shown = [(await cast.one.get(f"/decisions/{each}")).json() for each in ids]
        return all(each["review"]["state"] == "expired" for each in shown)

    await until(all_expired)
    connection = await asyncpg.connect(replicas.store_url)
    query = (
        "SELECT count(*), count(DISTINCT subject) FROM audit_entries WHERE kind = 'task.expired'"
    )
    assert tuple(await connection.fetchrow(query)) == (40, 40)
    await connection.close()

    async def all_counted() -> bool:
        after = [await metric(c, "holdgate_tasks_settled_total") for c in (cast.one, cast.two)]
        assert sum(after) - sum(before) <= 40
        return sum(after) - sum(before) == 40

    await until(all_counted)


# -------------------------------------------------------------------------------------------- Redis goes and comes


async def test_without_redis_decisions_still_wake_the_other_replica(
    redis_server: Redis, cast: Cast
) -> None:
    redis_server.kill()
    took_s = [await cast.seconds_to_wake(f"without redis {number}") for number in range(3)]
    assert max(took_s) < 1.5, took_s
    assert (await cast.one.get("/readyz")).status_code == 200
    redis_server.start()
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:

        async def both_listen() -> bool:
            [(_, count)] = await client.pubsub_numsub("holdgate:events")
            return bool(count == 2)

        await until(both_listen)
    took_s = [await cast.seconds_to_wake(f"with redis again {number}") for number in range(8)]
    assert max(took_s) < 0.3, took_s


async def test_gateway_starts_and_serves_without_redis(
    gateway: GatewayFactory, redis_server: Redis
) -> None:
    redis_server.kill()
    try:
        server = await asyncio.to_thread(gateway, POLICIES, redis_url=redis_server.url)
        async with caller(server.url) as http:
            waiting = asyncio.create_task(ask(http, "held", "alone"))
            await Reviewer(http).approve("alone")
            assert (await waiting).status_code == 200
    finally:
        redis_server.start()


# ---------------------------------------------------------------------------------------- PostgreSQL goes and comes


async def test_without_postgres_nothing_is_answered_and_afterwards_everything_is(
    postgres: Postgres, replicas: Replicas, cast: Cast
) -> None:
    waiting = asyncio.create_task(ask(cast.one, "held", "through the outage"))
    task = await cast.ann.task("through the outage")
    postgres.crash()
    try:
        answers = await asyncio.gather(
            *(
                ask(http, "plain", "unrecorded", stream=stream)
                for http in (cast.one, cast.two)
                for stream in (False, True)
            )
        )
        live = await ask(cast.one, "live", "unrecorded", stream=True)
        ready = await cast.one.get("/readyz")
        alive = await cast.one.get("/healthz")
        review = await cast.ann.submit(task["id"], "approve")
    finally:
        await asyncio.to_thread(postgres.start)
    for answer in answers:
        assert "unrecorded" not in answer.text
        assert "store_unavailable" in answer.text
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
    # What has been let through while it was watched cannot be taken back, but it does not end well.
    assert "store_unavailable" in live.text.rpartition("data: {")[2]
    assert (ready.status_code, alive.status_code, review.status_code) == (503, 200, 503)
    assert ready.json()["status"] == "not ready"
    assert "database" in ready.json()["store"]

    async def serves() -> bool:
        return (await ask(cast.one, "plain", "recorded again")).status_code == 200

    await until(serves)
    assert not waiting.done()
    (await cast.ben.submit(task["id"], "approve")).raise_for_status()
    answer = await waiting
    assert answer.json()["choices"][0]["message"]["content"] == "through the outage"


# ------------------------------------------------------------------------------------------- workers of one gateway


@pytest.fixture
def two_workers(gateway: GatewayFactory) -> Server:
    """A gateway of two worker processes on SQLite, without Redis."""
    return gateway(POLICIES, workers=2)


async def ask_all(clients: list[httpx.AsyncClient]) -> list[asyncio.Task[httpx.Response]]:
    """Every client waits for a held response of its own."""
    return [asyncio.create_task(ask(c, "held", f"waiting {n}.")) for n, c in enumerate(clients)]


async def test_hold_decided_through_any_worker_wakes_the_client_of_any_other(
    two_workers: Server,
) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(caller(two_workers.url)) for _ in range(12)]
        waiting = await ask_all(clients)
        http = clients[0]

        async def all_wait() -> bool:
            return await metric(http, "holdgate_waiting_clients") == 12

        await until(all_wait)
        began_s = time.monotonic()
        reviewers = [
            Reviewer(await stack.enter_async_context(caller(two_workers.url))) for _ in range(4)
        ]
        for number, each in enumerate(await reviewers[0].queue()):
            (await reviewers[number % 4].submit(each["id"], "approve")).raise_for_status()
        answers = [await each for each in waiting]
        assert time.monotonic() - began_s < 3
        assert [answer.status_code for answer in answers] == [200] * 12
        counts = {
            (
                await metric(c, "holdgate_decisions_total", action="hold"),
                await metric(c, "holdgate_tasks_settled_total", outcome="approve"),
                await metric(c, "holdgate_waiting_clients"),
            )
            for c in clients
        }
        assert counts == {(12, 12, 0)}


async def test_killed_worker_is_replaced_and_its_clients_find_their_holds(
    two_workers: Server,
) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(caller(two_workers.url)) for _ in range(8)]
        waiting = await ask_all(clients)
        http = await stack.enter_async_context(caller(two_workers.url))

        async def waiting_is(count: int) -> bool:
            return await metric(http, "holdgate_waiting_clients") == count

        await until(lambda: waiting_is(8))
        workers = [
            child.pid
            for child in psutil.Process(two_workers.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)

        async def retried(number: int) -> httpx.Response:
            try:
                return await waiting[number]
            except httpx.TransportError:
                return await ask(clients[number], "held", f"waiting {number}.", retry=1)

        again = [asyncio.create_task(retried(number)) for number in range(8)]

        async def all_wait_again() -> bool:
            with suppress(httpx.TransportError):
                return psutil.pid_exists(workers[0]) is False and await waiting_is(8)
            return False

        await until(all_wait_again)
        reviewer = Reviewer(http)
        queue = await reviewer.queue()
        assert len(queue) == 8
        for task in queue:
            await reviewer.submit(task["id"], "approve")
        answers = [await each for each in again]
        said = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
        assert said == [f"waiting {number}." for number in range(8)]
        await until(lambda: waiting_is(0))
