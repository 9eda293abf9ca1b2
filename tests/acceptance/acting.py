"""The people and programs around a gateway: who asks it, who reviews, and what is asked."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import httpx
import openai
import orjson

from gateway.auth import new_key
from gateway.records import Role
from gateway.store import open_store

T = TypeVar("T")

ENDPOINTS = ("chat", "completions", "responses")
#: Nothing here speaks TLS, and to load the trusted certificates takes longer than most tests.
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
PATHS = {"chat": "chat/completions", "completions": "completions", "responses": "responses"}


def policy(name: str, rest: str = "", *, tier: str = "critical") -> str:
    """A policy for the task of its own name that holds every response, as far as `rest` says nothing else."""
    lines = [
        f"policy: {name}",
        f"match: {{task: {name}}}",
        f"risk: {{base: {tier}}}",
        "confidence: {source: none, when_uncalibrated: hold}",
    ]
    return "\n".join([*lines, rest, ""])


def scripted(**script: Any) -> str:
    """A prompt that tells the demo upstream what to do."""
    return orjson.dumps({"demo": script}).decode()


def request(
    endpoint: str, task: str, prompt: str, *, stream: bool = False, **fields: Any
) -> dict[str, Any]:
    """The body of a call to a checked endpoint."""
    questions: dict[str, dict[str, Any]] = {
        "chat": {"messages": [{"role": "user", "content": prompt}]},
        "completions": {"prompt": prompt},
        "responses": {"input": prompt},
    }
    return {
        "model": "demo-large",
        "metadata": {"task": task},
        "stream": stream,
        **questions[endpoint],
        **fields,
    }


def text_of(endpoint: str, body: Mapping[str, Any]) -> str:
    """What the model said in a response body."""
    if endpoint == "responses":
        return "".join(part["text"] for item in body["output"] for part in item["content"])
    choice = body["choices"][0]
    return str(choice["text"] if endpoint == "completions" else choice["message"]["content"])


async def until(probe: Callable[[], Awaitable[T | None]], within_s: float = 15.0) -> T:
    """The first result of the probe that is neither None nor false.

    Raises
    ------
    TimeoutError
        If there is none within that time.
    """
    deadline_s = time.monotonic() + within_s
    while not (found := await probe()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {within_s} s")
        await asyncio.sleep(0.01)
    return found


async def make_keys(store_url: str, people: Mapping[str, Role]) -> dict[str, str]:
    """An API key for each of these people, by name."""
    store = await open_store(store_url)
    secrets = {}
    for name, role in people.items():
        key, secrets[name] = new_key(f"key_{name}", name, role, datetime.now(UTC))
        await store.create_key(key)
    await store.close()
    return secrets


@asynccontextmanager
async def caller(url: str, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client with that API key."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=30, limits=limits, trust_env=False, verify=_NO_TLS
    ) as http:
        yield http


@asynccontextmanager
async def official(
    url: str, key: str = "sk-app", **options: Any
) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client of an application, retrying as it does unless told otherwise."""
    given: dict[str, Any] = {"timeout": 30} | options
    wire = openai.DefaultAsyncHttpxClient(verify=_NO_TLS, trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=key, http_client=wire, **given
    ) as sdk:
        yield sdk


class Reviewer:
    """Somebody who works on the review queue."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self._requests: dict[str, str] = {}

    async def queue(self) -> list[dict[str, Any]]:
        """The tasks that are to be done."""
        answer = await self.http.get("/review/queue", params={"limit": 200})
        return list(answer.raise_for_status().json()["data"])

    async def task(self, marker: str) -> dict[str, Any]:
        """The task on the response to a prompt with that text in it, once it is in the queue."""

        async def find() -> dict[str, Any] | None:
            for task in await self.queue():
                if marker in await self._request(task["id"]):
                    return task
            return None

        return await until(find)

    async def _request(self, task_id: str) -> str:
        if task_id not in self._requests:
            shown = await self.http.get(f"/review/{task_id}")
            self._requests[task_id] = str(shown.raise_for_status().json()["request"])
        return self._requests[task_id]

    async def submit(self, task_id: str, verdict: str, **more: Any) -> httpx.Response:
        """Decide, whatever comes of it."""
        body = {"verdict": verdict, **more}
        return await self.http.post(f"/review/{task_id}/submit", json=body)

    async def approve(self, marker: str) -> dict[str, Any]:
        """Approve the response to the prompt with that text in it; the task as it was before."""
        task = await self.task(marker)
        (await self.submit(task["id"], "approve")).raise_for_status()
        return task
