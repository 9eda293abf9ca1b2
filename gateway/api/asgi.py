"""One HTTP exchange as raw ASGI: the body bounded, the answer sent, and the client's going away noticed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from functools import lru_cache
from urllib.parse import quote, unquote

from starlette.types import Receive, Scope, Send

from gateway.calls import Headers, Reply
from gateway.errors import InvalidRequest, PayloadTooLarge

#: How often a path may be percent-encoded before we stop looking what is inside.
_MAX_ENCODINGS = 4
_PARAMETERS = re.compile(r"[;?#\x00-\x20\x7f]")


class Exchange:
    """A request and its response. `values` are the request headers by lower-case name (of several the last).

    Once the body is read, a client that goes away cancels the task that answers it; `gone` then says why.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, limit_bytes: int) -> None:
        self._receive = receive
        self._send = send
        self._limit_bytes = limit_bytes
        self._task = asyncio.current_task()
        self._watching: asyncio.Task[None] | None = None
        self.method: str = scope["method"]
        self.query: str = scope["query_string"].decode("latin-1")
        self.headers: Headers = [
            (k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]
        ]
        self.values = dict(self.headers)
        self.raw_path = _raw_path(scope)
        self.id = ""
        self.gone = False
        self.started = False
        self.ended = False

    @property
    def path(self) -> str:
        """The path below /v1 as the most forgiving server may read it: decoded to the end, without parameters.

        Raises
        ------
        InvalidRequest
            If it has empty or dot segments: what a provider makes of them may be another path than the one checked here.
        """
        return _plain(self.raw_path)

    @property
    def has_body(self) -> bool:
        """Whether the request announces a body."""
        return "transfer-encoding" in self.values or self.values.get("content-length", "0") != "0"

    async def body(self) -> bytes:
        """The whole body.

        Raises
        ------
        PayloadTooLarge
            If it is longer than `limits.request_bytes`; nothing beyond the limit is kept.
        """
        length = self.values.get("content-length", "")
        if length.isdigit() and int(length) > self._limit_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size_bytes = 0
        async for part in self.stream():
            size_bytes += len(part)
            if size_bytes > self._limit_bytes:
                raise self._too_large()
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def stream(self) -> AsyncIterator[bytes]:
        """The body piece by piece, as it arrives."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._leave()
                raise ConnectionResetError("the client went away")
            if part := message.get("body"):
                yield part
            if not message.get("more_body"):
                break
        self.watch()

    def watch(self) -> None:
        """From now on, cancel the answering task when the client goes away."""
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._until_gone())

    async def respond(self, reply: Reply) -> None:
        """Send a whole reply; one whose body is an iterator piece by piece, at the pace of the client."""
        if isinstance(reply.body, bytes):
            headers = [(b"content-length", str(len(reply.body)).encode()), *_encoded(reply.headers)]
            await self._start(reply.status, headers)
            await self.send(reply.body, more=False)
        else:
            await self._start(reply.status, _encoded(reply.headers))
            await self.send_parts(reply.body)

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers; the body follows by `send`."""
        await self._start(status, _encoded(headers))

    async def send(self, part: bytes, *, more: bool) -> None:
        """Send a piece of the body; without `more` it is the last."""
        self.ended = not more
        await self._send({"type": "http.response.body", "body": part, "more_body": more})

    async def send_parts(self, parts: AsyncIterator[bytes] | bytes) -> None:
        """Send what is left of the body, and end it."""
        if isinstance(parts, bytes):
            await self.send(parts, more=False)
            return
        try:
            async for part in parts:
                await self.send(part, more=True)
        finally:
            close = getattr(parts, "aclose", None)
            if close is not None:
                await close()
        await self.send(b"", more=False)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if not self.ended and self._task is not None:
            self.gone = True
            self._task.cancel()

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"The request body is longer than {self._limit_bytes} bytes (limits.request_bytes)."
        )


def _encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]


@lru_cache(maxsize=256)
def _plain(path: str) -> str:
    for _ in range(1 + _MAX_ENCODINGS):
        path = unquote(path)
    segments = path.removesuffix("/").split("/")[1:]
    if {".", ".."} & set(segments) or "" in segments or "\\" in path:
        raise InvalidRequest(
            f"The path {path[:200]!r} has empty or dot segments; write it plainly.",
            code="invalid_path",
        )
    return "".join("/" + _PARAMETERS.split(segment, 1)[0] for segment in segments)


def _raw_path(scope: Scope) -> str:
    """The path below /v1 as the client wrote it."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    return raw.decode("latin-1").partition("?")[0].removeprefix("/v1")
