"""The OpenAI edge before a provider on the same event loop, so that the order of what happens is known."""

from __future__ import annotations

import asyncio

import orjson
from starlette.types import Message

from gateway.api.openai import OpenAIEdge
from gateway.asking import Asker
from gateway.auth import Authenticator
from gateway.delivery import Delivery
from gateway.live import LiveStreams
from gateway.pipeline import Pipeline
from gateway.ports import UpstreamCall, UpstreamResponse
from gateway.reviews import Reviews, WaitingRoom
from gateway.services import Services
from gateway.settings import ModelEntry, Settings
from gateway.store import SqlStore
from gateway.upstream.routing import Router
from policies import PolicySet
from tests.gateway.rig import OBSERVES, Rig, streams

AT_ONCE = 8
BODY = orjson.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
)


class Order:
    """What has happened: `prepared` requests are about to be given to the HTTP client, `read` ones are at the provider."""

    def __init__(self) -> None:
        self.prepared = self.read = self.ahead = 0

    def note(self, *, prepared: int = 0, read: int = 0) -> None:
        self.prepared += prepared
        self.read += read
        self.ahead = max(self.ahead, self.prepared - self.read)


class Noting(Router):
    """The real router, which notes when a call comes."""

    def __init__(self, settings: Settings, order: Order) -> None:
        super().__init__(settings)
        self._order = order

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        self._order.note(prepared=1)
        return await super().send(call)


class Provider(asyncio.Protocol):
    """One connection to a provider that answers nobody before all have asked."""

    def __init__(self, order: Order, asking: list[Provider]) -> None:
        self._order, self._asking = order, asking

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if BODY not in data:
            return
        self._order.note(read=1)
        self._asking.append(self)
        if len(self._asking) == AT_ONCE:
            for each in self._asking:
                each.answer()
            self._asking.clear()

    def answer(self) -> None:
        events = b"".join(streams("fine").parts)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % len(events) + events)


async def ask(edge: OpenAIEdge) -> list[Message]:
    """What an ASGI server would send to the client of one stream."""
    sent: list[Message] = []
    received = iter([{"type": "http.request", "body": BODY, "more_body": False}])

    async def receive() -> Message:
        for message in received:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    await edge(scope, receive, send)
    return sent


def edge_before(models: Router, settings: Settings, store: SqlStore) -> OpenAIEdge:
    rig = Rig(store)
    rig.policies.current = PolicySet([OBSERVES])
    room = WaitingRoom(store, rig.bus, rig.clock, rig.metrics, usd_per_minute=1)
    asker = Asker(models, rig.clock, response_bytes=1_000_000)
    live = LiveStreams(rig.assessor, rig.recorder, rig.clock, response_bytes=1_000_000)
    services = Services(
        settings=settings,
        store=store,
        bus=rig.bus,
        models=models,
        clock=rig.clock,
        metrics=rig.metrics,
        policies=rig.policies,
        authenticator=Authenticator(store, required=None, monotonic_s=rig.clock.monotonic_s),
        interviewer=rig.interviewer,
        pipeline=Pipeline(store, asker, rig.assessor, rig.recorder, live, rig.clock),
        delivery=Delivery(store, room, keepalive_s=15, max_waiting=100),
        reviews=Reviews(store, rig.bus, rig.clock, room),
        room=room,
    )
    return OpenAIEdge(services)


async def test_of_streams_that_come_together_each_is_sent_on_before_the_next_but_one_is_prepared(
    store: SqlStore,
) -> None:
    order, asking = Order(), list[Provider]()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Provider(order, asking), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = Settings(models=(ModelEntry(match="*", base_url=f"http://127.0.0.1:{port}"),))
    models = Noting(settings, order)
    edge = edge_before(models, settings, store)
    # The first ones make the connections.
    for _ in range(2):
        order.ahead = 0
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*(ask(edge) for _ in range(AT_ONCE)))
        assert [answer[0]["status"] for answer in answers] == [200] * AT_ONCE
    await models.close()
    server.close()
    assert order.prepared == order.read == 2 * AT_ONCE
    assert 1 <= order.ahead <= 2
