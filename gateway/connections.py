"""HTTP/1.1 to others' servers: a request goes out at once, its response comes as it is sent, connections are used again.

It does what a gateway needs and no more: no redirects, no cookies, no proxies, no headers of its own but `host` and how long the body is.
What one call takes before it is sent, all others that are ready wait for: a general client takes more. The parser (llhttp) is our server's.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from functools import cache, partial
from socket import SOCK_STREAM

from aiohappyeyeballs import start_connection
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from yarl import URL

from gateway.errors import InvalidRequest, UpstreamError, UpstreamTimeout
from gateway.settings import Timeouts

#: So long a connection is kept for the next request.
_REST_S = 15.0
#: So much more than its body a response may be: status, headers, the frames of chunks.
_HEAD_BYTES = 65_536
_NOT_HTTP = f"sent something that is not HTTP, or has more than {_HEAD_BYTES} bytes of headers."
#: So much of a response is buffered before its server is made to wait.
_BUFFER_BYTES = 2**18
#: How much sooner one address of a server is tried than the next (RFC 8305, section 5).
_HEAD_START_S = 0.25

#: A server that closes a rested connection has not acted on these, or may act on them twice (RFC 9110, section 9.2.2).
_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_WITHOUT_BODY = (204, 304)

Body = bytes | AsyncIterator[bytes]


class Server:
    """A server and the connections to it, as many as there are requests at once. To be used on one event loop."""

    def __init__(self, url: URL, times: Timeouts) -> None:
        self.origin = str(url.origin())
        self.times = times
        self._host, self._port = url.raw_host or "", url.port or 80
        self._authority = url.host_port_subcomponent or ""
        self._tls = _tls() if url.scheme == "https" else None
        self._connections: set[_Connection] = set()
        self._rested: list[_Connection] = []

    async def ask(
        self, method: str, target: str, headers: Sequence[tuple[str, str]], body: Body
    ) -> Incoming:
        """Send a request and return as soon as the status and the headers of its response are there.

        A body that is no bytes is sent piece by piece, in chunks unless `headers` say how long it is.

        Raises
        ------
        InvalidRequest
            If a header cannot be written down.
        UpstreamTimeout, UpstreamError
            If the server cannot be reached, or does not answer.
        """
        head = _head(method, target, [("host", self._authority), *headers], body)
        deadline_s = asyncio.get_running_loop().time() + self.times.total
        while connection := self._take():
            try:
                return await connection.ask(method, head, body, deadline_s)
            except _Unanswered:
                if method not in _REPEATABLE or not isinstance(body, bytes):
                    raise
        connection = await self._connect()
        return await connection.ask(method, head, body, deadline_s)

    def _take(self) -> _Connection | None:
        while self._rested:
            connection = self._rested.pop()
            if connection.wake():
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(min(self.times.connect, self.times.total)):
                addresses = await loop.getaddrinfo(self._host, self._port, type=SOCK_STREAM)
                sock = await start_connection(addresses, happy_eyeballs_delay=_HEAD_START_S)
                try:
                    _, connection = await loop.create_connection(
                        partial(_Connection, self),
                        sock=sock,
                        ssl=self._tls,
                        server_hostname=self._host if self._tls else None,
                    )
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError as error:
            raise UpstreamError(f"{self.origin} did not accept a connection in time.") from error
        except ssl.SSLError as error:
            message = f"No trusted TLS connection to {self.origin} can be made."
            raise UpstreamError(message) from error
        except OSError as error:
            number = error.errno or 0  # a name server's are below zero
            reason = os.strerror(number) if number > 0 else error.strerror or type(error).__name__
            raise UpstreamError(f"Could not connect to {self.origin}: {reason}.") from error
        self._connections.add(connection)
        return connection

    def rest(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        self._rested.append(connection)

    def forget(self, connection: _Connection) -> None:
        """A connection is no more."""
        self._connections.discard(connection)
        if connection in self._rested:
            self._rested.remove(connection)

    async def close(self) -> None:
        """End every connection, whatever is under way on it."""
        for connection in list(self._connections):
            connection.end()


class _Unanswered(UpstreamError):
    """The connection was closed before a byte of the response came."""


class _Connection(asyncio.Protocol):
    """One connection, with one exchange under way on it, or none."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._incoming: Incoming | None = None
        self._transport: asyncio.Transport | None = None
        self._flowing: asyncio.Future[None] | None = None
        self._resting: asyncio.TimerHandle | None = None

    async def ask(self, method: str, head: bytes, body: Body, deadline_s: float) -> Incoming:
        """See `Server.ask`."""
        incoming = self._incoming = Incoming(self, method, deadline_s)
        if self._transport is None:
            self.connection_lost(None)
        elif isinstance(body, bytes):
            self._transport.write(head + body if body else head)
        else:
            self._transport.write(head)
            incoming.upload(body, in_chunks=b"\r\ntransfer-encoding: chunked\r\n" in head)
        await incoming.begun()
        return incoming

    @property
    def is_clogged(self) -> bool:
        """Whether the server has yet to take what was written."""
        return self._flowing is not None

    async def write(self, data: bytes) -> None:
        """Write, at the pace at which the server reads."""
        if self._transport is not None:
            self._transport.write(data)
        if self._flowing is not None:
            await asyncio.shield(self._flowing)

    def flow(self, *, go_on: bool) -> None:
        """Have the server wait, or go on."""
        if self._transport is not None and not self._transport.is_closing():
            (self._transport.resume_reading if go_on else self._transport.pause_reading)()

    def rest(self) -> None:
        """Wait for the next request, not for ever."""
        self._incoming = None
        if self._transport is None or self._transport.is_closing():
            return
        self._resting = asyncio.get_running_loop().call_later(_REST_S, self.end)
        self.server.rest(self)

    def wake(self) -> bool:
        """Whether the next request may be sent."""
        if self._resting is not None:
            self._resting.cancel()
        return self._transport is not None and not self._transport.is_closing()

    def drop(self) -> None:
        """End it; its exchange has ended, and hears no more of it."""
        self._incoming = None
        self.end()

    def end(self) -> None:
        """End it, without waiting for anything."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is there."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Something came; what nobody has asked for ends it."""
        if self._incoming is None:
            self.end()
        else:
            self._incoming.feed(data)

    def pause_writing(self) -> None:
        """The server does not take more for now."""
        self._flowing = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """The server takes more."""
        if self._flowing is not None:
            self._flowing.set_result(None)
            self._flowing = None

    def connection_lost(self, exc: Exception | None) -> None:
        """It is no more."""
        self._transport = None
        self.resume_writing()
        self.server.forget(self)
        if self._resting is not None:
            self._resting.cancel()
        if self._incoming is not None:
            self._incoming.lost(is_clean=exc is None)
            self._incoming = None


class Incoming:
    """A response: `status`, and `headers` in lower case as they came, are there; the body comes by iteration, once.

    Whatever ends it too early is raised once all that came before it has been read, as an `UpstreamError`; `UpstreamTimeout` if
    the server says nothing for `times.read` seconds while it is its turn, or not all within `times.total`.
    """

    def __init__(self, connection: _Connection, method: str, deadline_s: float) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self._connection = connection
        self._server = connection.server
        self._loop = asyncio.get_running_loop()
        self._parser = HttpResponseParser(self)
        self._is_head = method == "HEAD"
        self._parts: list[bytes] = []
        self._size_bytes = self._head_bytes = self._other_bytes = 0
        self._waiting: asyncio.Future[None] | None = None
        self._uploading: asyncio.Task[None] | None = None
        self._fault: UpstreamError | None = None
        self._has_begun = self._has_ended = self._is_full = False
        self._ends_with_connection = False
        self._may_go_on = True
        self._deadline_s = deadline_s
        self._moved_s = self._loop.time()
        self._timer = self._loop.call_at(self._silent_until_s, self._check_time)

    # ------------------------------------------------------------------------------------------- the reader's side

    async def begun(self) -> None:
        """Return once status and headers are there."""
        try:
            while not self._has_begun and self._fault is None:
                await self._change()
        except BaseException:
            self.close()
            raise
        if not self._has_begun and self._fault is not None:
            raise self._fault

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The body piece by piece, as it arrives."""
        return self

    async def __anext__(self) -> bytes:
        """What has arrived since, or the next that arrives."""
        while not self._parts:
            if self._fault is not None:
                raise self._fault
            if self._has_ended:
                raise StopAsyncIteration
            await self._change()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size_bytes = 0
        if self._is_full:
            self._is_full = False
            self._moved_s = self._loop.time()
            if not self._has_ended:
                self._connection.flow(go_on=True)
        return data

    def close(self) -> None:
        """Let go of it: if it has not ended, the connection ends, and the server stops."""
        if not self._has_ended:
            self.fail(self._error("had its response closed."))

    async def _change(self) -> None:
        self._waiting = self._loop.create_future()
        await self._waiting

    def _tell(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # ----------------------------------------------------------------------------------------------- the upload

    def upload(self, body: AsyncIterator[bytes], *, in_chunks: bool) -> None:
        """Send the body of the request, while the response may come already."""
        self._uploading = asyncio.create_task(self._upload(body, in_chunks=in_chunks))

    async def _upload(self, body: AsyncIterator[bytes], *, in_chunks: bool) -> None:
        try:
            async for part in body:
                if part:
                    framed = b"%x\r\n%b\r\n" % (len(part), part) if in_chunks else part
                    await self._connection.write(framed)
            if in_chunks:
                await self._connection.write(b"0\r\n\r\n")
        except Exception as error:  # noqa: BLE001 - whatever broke, there is no whole request
            self.fail(self._error(f"got no whole request ({type(error).__name__})."))
        self._moved_s = self._loop.time()

    @property
    def _is_uploading(self) -> bool:
        return self._uploading is not None and not self._uploading.done()

    # ------------------------------------------------------------------------------------------- the server's side

    def feed(self, data: bytes) -> None:
        """More has come."""
        self._moved_s = self._loop.time()
        self._other_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._may_go_on = False
            self.fail(self._error(_NOT_HTTP))
        if self._other_bytes > _HEAD_BYTES:
            self.fail(self._error(_NOT_HTTP))
        if self._has_ended:
            self._part()

    def on_message_begin(self) -> None:
        """A response begins; there is to be one only, but for interim ones."""
        self._may_go_on = self._may_go_on and not self._has_ended

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is there, or a trailer, which nobody asked for."""
        if not self._has_begun:
            self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))
            self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """All headers are there."""
        if self._has_begun or (status := self._parser.get_status_code()) < 200:
            return
        if self._head_bytes > _HEAD_BYTES:
            raise ValueError(_NOT_HTTP)  # the parser makes an error of its own of it
        self.status, self._has_begun = status, True
        self._other_bytes = 0
        names = dict(self.headers)
        is_framed = "content-length" in names or "chunked" in names.get("transfer-encoding", "")
        self._ends_with_connection = not is_framed and self.status not in _WITHOUT_BODY
        if self._is_head:
            # The parser waits for the body that the headers describe.
            self._may_go_on = False
            self._end()
        self._tell()

    def on_body(self, part: bytes) -> None:
        """A piece of the body is there."""
        if self._has_ended:
            return
        self._other_bytes = 0
        self._parts.append(part)
        self._size_bytes += len(part)
        if self._size_bytes > _BUFFER_BYTES and not self._is_full:
            self._is_full = True
            self._connection.flow(go_on=False)
        self._tell()

    def on_message_complete(self) -> None:
        """The response is whole; an interim one is not the response (RFC 9110, section 15.2)."""
        if not self._has_begun:
            self.headers.clear()
        elif not self._has_ended:
            self._may_go_on = self._may_go_on and bool(self._parser.should_keep_alive())
            self._end()

    def lost(self, *, is_clean: bool) -> None:
        """The connection is no more."""
        if not self._has_begun:
            self.fail(self._error("closed the connection before it answered.", _Unanswered))
        elif self._ends_with_connection and is_clean and not self._has_ended:
            self._end()
        else:
            self.fail(self._error("broke off in the middle of its response."))

    def fail(self, error: UpstreamError) -> None:
        """End it here, because of this, unless it has ended."""
        if self._has_ended or self._fault is not None:
            return
        self._fault = error
        self._leave()
        self._connection.drop()

    def _end(self) -> None:
        self._has_ended = True
        self._may_go_on = self._may_go_on and not self._is_uploading
        self._leave()

    def _leave(self) -> None:
        del self._parser  # which knows us: neither is to wait for the collector
        self._timer.cancel()
        if self._uploading is not None:
            self._uploading.cancel()
        self._tell()

    def _part(self) -> None:
        """Leave the connection to the next request, if there is nothing more on it."""
        if not self._may_go_on:
            self._connection.drop()
            return
        if self._is_full:
            self._connection.flow(go_on=True)
        self._connection.rest()

    # ------------------------------------------------------------------------------------------------------- time

    @property
    def _silent_until_s(self) -> float:
        return min(self._moved_s + self._server.times.read, self._deadline_s)

    def _check_time(self) -> None:
        now_s = self._loop.time()
        if self._is_full or self._is_uploading or self._connection.is_clogged:
            self._moved_s = now_s
        if now_s >= self._silent_until_s:
            self.fail(self._error("did not answer in time.", UpstreamTimeout))
        else:
            self._timer = self._loop.call_at(self._silent_until_s, self._check_time)

    def _error(self, what: str, kind: type[UpstreamError] = UpstreamError) -> UpstreamError:
        return kind(f"{self._server.origin} {what}")


def _head(method: str, target: str, headers: list[tuple[str, str]], body: Body) -> bytes:
    """The request line and the headers; values are written as our own server reads them, in Latin-1."""
    if not isinstance(body, bytes):
        if all(name != "content-length" for name, _ in headers):
            headers.append(("transfer-encoding", "chunked"))
    elif body or method in _WITH_BODY:
        headers.append(("content-length", str(len(body))))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    text = "\r\n".join(lines) + "\r\n\r\n"
    breaks = len(lines) + 1
    if text.count("\r") != breaks or text.count("\n") != breaks or "\0" in text:
        raise InvalidRequest("A header with a line break cannot be forwarded.")
    return text.encode("latin-1", "replace")


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
