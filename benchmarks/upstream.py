"""The benchmark's upstream: prepared bytes, at the pace that the model's name asks for (`bench-50ms`, `bench-5mspt`).

A judge's question gets a verdict.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from benchmarks import answers

Send = Callable[[dict[str, Any]], Awaitable[None]]
_PLAIN = answers.completion(with_logprobs=False)
_LOGPROBS = answers.completion(with_logprobs=True)
_CHUNKS = answers.chunks()
_DELAY = re.compile(rb"-(\d+)ms[-\"]")
_PACE = re.compile(rb"-(\d+)mspt")
_NONCE = re.compile(rb"<<<([0-9a-f]{16,64})")


async def app(
    scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Send
) -> None:
    """Answer a chat completion; the response depends on the request alone."""
    if scope["type"] != "http":
        return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if delay := _DELAY.search(body):
        await asyncio.sleep(int(delay[1]) / 1000)
    if b'"stream": true' in body:
        await _stream(body, send)
        return
    reply = _LOGPROBS if b'"logprobs": true' in body else _PLAIN
    if nonce := _NONCE.search(body):
        reply = answers.verdict(nonce[1].decode())
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(reply)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": reply})


async def _stream(body: bytes, send: Send) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream")],
        }
    )
    pace = _PACE.search(body)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for number, chunk in enumerate(_CHUNKS):
        if pace:
            due_s = began_s + number * int(pace[1]) / 1000
            await asyncio.sleep(max(due_s - loop.time(), 0))
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="uvloop",
    )
