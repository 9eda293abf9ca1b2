"""A receiver hears of held responses though gateways die; requests do not hear of the receiver."""

from __future__ import annotations

import asyncio
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from standardwebhooks import Webhook

from tests.acceptance.acting import Reviewer, caller, policy, request, scripted
from tests.conftest import GatewayFactory

SECRET = f"whsec_{b64encode(bytes(range(32))).decode()}"
CHAT = "/v1/chat/completions"


class Receiver(ThreadingHTTPServer):
    """Keeps what it is sent once its signature is verified; answers when `gate` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events: list[tuple[str, Any]] = []
        self.gate = threading.Event()
        self.changed = threading.Condition()
        self.url = f"http://127.0.0.1:{self.server_port}/hook"

    def has(self, count: int) -> list[tuple[str, Any]]:
        """The ids and events that came, once there are so many different ones."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(dict(self.events)) >= count, 50), self.events
            return list(self.events)

    def has_again(self, event_id: str) -> list[tuple[str, Any]]:
        """The same, once that one came a second time."""

        def came() -> bool:
            return [each for each, _ in self.events].count(event_id) > 1

        with self.changed:
            assert self.changed.wait_for(came, 50), self.events
            return list(self.events)


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        event = Webhook(SECRET).verify(body, dict(self.headers.items()))
        with self.server.changed:
            self.server.events.append((self.headers["webhook-id"], event))
            self.server.changed.notify_all()
        self.server.gate.wait(60)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with _running(Receiver()) as server:
        yield server


@contextmanager
def _running(server: Receiver) -> Iterator[Receiver]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


def hook(receiver: Receiver, *events: str) -> dict[str, Any]:
    entry = {"name": "crm", "url": receiver.url, "secret_env": "SECRET", "events": list(events)}
    return {"webhooks": [entry], "env": {"SECRET": SECRET}}


async def test_events_of_a_hold_are_verified_by_a_stock_receiver(
    gateway: GatewayFactory, receiver: Receiver
) -> None:
    receiver.gate.set()
    server = gateway(
        {"held": policy("held", "hold: {wait: 20s}")},
        **hook(receiver, "task.opened", "task.settled"),
    )
    async with caller(server.url) as http:
        body = request("chat", "held", scripted(text="CANARY"))
        waiting = asyncio.create_task(http.post(CHAT, json=body))
        (opened,) = await asyncio.to_thread(receiver.has, 1)
        await Reviewer(http).submit(opened[1]["data"]["task"], "approve")
        answer = await waiting
        _, settled = await asyncio.to_thread(receiver.has, 2)
    assert answer.headers["x-holdgate-decision"] == opened[1]["data"]["decision"]
    assert (opened[1]["type"], settled[1]["type"]) == ("task.opened", "task.settled")
    assert settled[1]["data"]["status"] == "approved"
    assert "CANARY" not in str(receiver.events)


async def test_kill_in_the_middle_of_a_delivery_loses_nothing(
    gateway: GatewayFactory, receiver: Receiver
) -> None:
    server = gateway({"held": policy("held", "hold: {wait: 0s}")}, **hook(receiver, "task.opened"))
    async with caller(server.url) as http:
        for number in range(12):
            body = request("chat", "held", scripted(text=f"answer {number}"))
            answer = await http.post(CHAT, json=body, timeout=5)
            assert answer.status_code == 423, "the receiver stalls, and no request waits for it"
    (stalled, _), *_ = await asyncio.to_thread(receiver.has, 1)
    server.kill()
    receiver.gate.set()
    await asyncio.to_thread(server.start)
    await asyncio.to_thread(receiver.has, 12)
    again = await asyncio.to_thread(receiver.has_again, stalled)
    tasks = {event["data"]["task"]: each for each, event in again}
    assert len(tasks) == len(set(tasks.values())) == 12, "each event comes, and keeps its id"
