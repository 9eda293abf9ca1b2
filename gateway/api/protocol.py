"""HTTP/1.1 below the application: request heads bounded in size and time, and refusals in the shape of the API."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from gateway.errors import GatewayError, HeadTooLarge, InvalidRequest

#: How long a client may take over the head of a request.
_HEAD_S = 60.0

#: How long what a refused client still sends is read, so that it gets to read the refusal (RFC 9112, section 9.6).
_LINGER_S = 2.0


class Protocol(HttpToolsProtocol):
    """One connection. A head longer than `limits.header_bytes` gets 431, what is not HTTP gets 400; both close it."""

    # With more than 30 attributes in its __dict__ an object takes a kilobyte more (PEP 412), and thousands wait.
    __slots__ = ("_head_bytes", "_in_head", "_patience", "_refused", "_services")

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._services = app_state["services"]
        self._head_bytes = 0
        self._in_head = False
        self._refused = False
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: its first request is awaited from now on."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._head_has_come()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in bytes; of a head that does not end, no more than the limit and one read are kept."""
        if self._refused:
            return
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self._limit_bytes:
                self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._await_head()

    def on_headers_complete(self) -> None:
        """The head is there: start to answer, if it is no longer than it may be."""
        self._in_head = False
        self._head_has_come()
        size_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size_bytes > self._limit_bytes:
            self.app = self._answer_too_large
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(InvalidRequest(msg, code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a client that would rather speak another protocol is answered in this one."""

    @property
    def _limit_bytes(self) -> int:
        return int(self._services.settings.limits.header_bytes)

    def _await_head(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(_HEAD_S, self.transport.close)

    def _head_has_come(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"The request's line and headers are longer than {self._limit_bytes} bytes (limits.header_bytes).",
            headers={"connection": "close"},
        )

    async def _answer_too_large(self, _: Scope, __: Receive, send: Send) -> None:
        error = self._too_large()
        self._services.metrics.errors.labels(error.code).inc()
        body = error.body()
        headers = [(name.encode(), value.encode()) for name, value in _headers(error, body).items()]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refuse(self, error: GatewayError) -> None:
        """Answer without the application and close, once the client has had time to read it."""
        self._refused = True
        self._services.metrics.errors.labels(error.code).inc()
        body = error.body()
        headers = _headers(error, body) | {"connection": "close"}
        lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


def _headers(error: GatewayError, body: bytes) -> dict[str, str]:
    about = {"content-type": "application/json", "content-length": str(len(body))}
    return about | error.headers
